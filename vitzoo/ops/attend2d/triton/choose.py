"""Which schedule runs a call, and with which tiles.

The choice looks at shapes and the GPU's generation, never at how many multiprocessors it has: a call gives the same bits on
every card of a generation. Tiles come from rules; `vitzoo.ops._triton.tuning` may know better. Everything here is integers,
cached by `Problem`, so that a call pays for its launches and not for its plans.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vitzoo.ops._triton.host import architecture, power
from vitzoo.ops.attend2d.triton import _spans
from vitzoo.patterns import Pattern, Span

TABLE_SIDE = 64  # a larger table's gradient is summed in blocks of this side, a pass over the pairs for each


class Tiles(NamedTuple):
    """A schedule's configuration: query tile, key tile, warps, stages of the software pipeline."""

    QY: int
    QX: int
    KY: int
    KX: int
    warps: int
    stages: int


class Whole(NamedTuple):
    """A partition's configuration: tile, warps, stages, and whether shifted runs are joined where they can be."""

    TY: int
    TX: int
    warps: int
    stages: int
    joined: int


class Problem(NamedTuple):
    """A call on concrete sizes, with what every launch of it needs."""

    B: int
    H: int
    W: int
    N: int
    D: int
    rows: Span
    cols: Span
    reach: tuple[int, int]
    dtype: torch.dtype
    arch: int

    @property
    def block_d(self) -> int:
        return max(16, power(self.D))

    @property
    def bits(self) -> int:
        return torch.finfo(self.dtype).bits

    @property
    def lengths(self) -> tuple[int, int]:
        """Positions in the longest residue class of each axis."""
        return -(-self.H // self.rows.step), -(-self.W // self.cols.step)


def problem(q: Tensor, pattern: Pattern) -> Problem:
    return _problem(tuple(q.shape), pattern, q.dtype, architecture(q))


@functools.lru_cache(1024)
def _problem(shape: tuple[int, ...], pattern: Pattern, dtype: torch.dtype, arch: int) -> Problem:
    B, H, W, N, D = shape
    spans = pattern.resolve(H, W)
    return Problem(B, H, W, N, D, spans.rows, spans.cols, pattern.reach(H, W), dtype, arch)


@functools.lru_cache(1024)
def geometry(p: Problem) -> dict[str, int]:
    """What all kernels are told about the map and the pattern, by parameter name."""
    values = {"heads": p.N, "H": p.H, "W": p.W, "D": p.D, "BLOCK_D": p.block_d}
    for axis, span in (("y", p.rows), ("x", p.cols)):
        values |= {f"{name}_{axis}": getattr(span, name) for name in ("size", "step", "stride", "shift")}
    return values


# ---- the choice ----------------------------------------------------------------------------------------------------------


def partitions(p: Problem) -> bool:
    """Whether schedule A runs the forward: both axes split into runs, a run fits one tile of 64."""
    if p.rows.edge == "clamp" or p.cols.edge == "clamp":
        return False
    if p.rows.size != p.rows.stride or p.cols.size != p.cols.stride:
        return False
    return power(p.rows.size) * power(p.cols.size) <= 64 and p.block_d <= (256 if p.bits == 16 else 32)


def partitions_backward(p: Problem) -> bool:
    """Schedule A in the backward: fp32, or more than 64 channels (32 before sm_90), does not fit the registers."""
    if p.arch == 0:
        return partitions(p)  # the interpreter has no registers, and checks the kernel at every precision
    return partitions(p) and p.bits == 16 and p.block_d <= (64 if p.arch >= 90 else 32)


@functools.lru_cache(1024)
def partition_rule(p: Problem, backward: bool) -> Whole:
    """One run a tile, its sides rounded up to powers of two; several where one has less than the 16 tokens of a product."""
    y, x = power(p.rows.size), power(p.cols.size)
    x = max(x, 16 // y)
    warps = max(1, y * x // 16)  # more would do the same work twice; on sm_100 see walk_rule
    if p.arch >= 100 and not backward and p.block_d <= 64:
        warps = min(warps, 2)
    stages = 2 if p.block_d * p.bits <= 1024 else 1
    return Whole(y, x, warps, stages, int(joining_saves(p) > (1 if p.arch >= 90 else JOIN_FROM)))


def partition_others(p: Problem, rule: Whole) -> list[Whole]:
    """What else is worth timing."""
    others = [rule._replace(stages=3 - rule.stages)]
    if rule.warps > 1:
        others.append(rule._replace(warps=rule.warps // 2))
    if joining_saves(p) > 1:
        others.append(rule._replace(joined=1 - rule.joined))
    if rule.TY * rule.TX <= 32:  # several runs to a tile, or twice as many
        others.append(rule._replace(TX=2 * rule.TX, warps=2 * rule.warps))
    return others


def partition_key(p: Problem, name: str, bias: bool) -> tuple:
    sizes = p.rows.size, p.cols.size, round(10 * joining_saves(p))
    return "attend2d", f"partition_{name}", *sizes, p.block_d, p.arch, p.dtype, "bias" if bias else "none"


JOIN_FROM = 1.4
"""Before sm_90 runs are joined where cutting makes so many times as many tiles: there it takes a third more registers."""


def can_join(span: Span, n: int) -> bool:
    """Whether the places that the border leaves free in the last run hold what it leaves of the first."""
    rest = (n - span.shift) % span.stride
    return span.step == 1 and span.shift > 0 and n > span.shift and 0 < rest <= span.stride - span.shift


@functools.lru_cache(1024)
def joining_saves(p: Problem) -> float:
    """How many times as many tiles cut runs make as joined ones."""
    saves = 1.0
    for span, n in ((p.rows, p.H), (p.cols, p.W)):
        if can_join(span, n):
            joined = (n - span.shift) // span.stride + 1
            saves *= (joined + 1) / joined
    return saves


@functools.lru_cache(1024)
def walk_rule(p: Problem, name: str) -> Tiles:
    """Query tile (of walk_dkv: key tile) and the partner tile it steps through.

    Small tiles waste least where runs move with every query (neighborhoods); where many queries share a run, 64 of them do.
    """
    sides, moving = [], []
    for span, length, small in zip((p.rows, p.cols), p.lengths, (4, 8), strict=True):
        shared = span.stride > 4 or span.stride == span.size
        moving.append(not shared)
        sides.append(min(power(span.stride) if shared else small, power(length)))
    folds = name == "dq_dbias"  # sums pairs by offset with a one-hot matrix of own_x * other_x rows
    small = any(moving) or p.bits == 32 or p.block_d >= (64 if folds else 128)
    # from sm_100 on a product of 64 rows goes to tcgen05, which doubles the work per thread; 32 rows stay with mma.sync
    area = 32 if small or p.arch >= 100 else 64
    long = p.bits == 32 and p.block_d >= 128  # rows of half a kilobyte and more, three products each
    area = 16 if long else area
    own_x = min(sides[1], 16)
    own_y = min(sides[0], area // own_x)
    own_x = max(min(sides[1], 16 if folds else area, area // own_y), 16 // own_y)
    width_y, width_x = (power(_spans.seen_width(span, n, own)) for span, n, own in ((p.rows, p.H, own_y), (p.cols, p.W, own_x)))
    other_x = min(width_x, 256 // own_x if folds else 32, 16 if long else 32)
    # two rows of partners where they are wide, unless that fills the shared memory (99 KB on sm_86 and sm_89)
    other_area = area if area < 64 and (other_x <= 16 or p.block_d > 128) else 64
    other_y = max(1, min(width_y, other_area // other_x))
    other_x = max(other_x, 16 // other_y)
    warps = max(1, own_y * own_x // 16) * max(1, p.block_d // 64) * (p.bits // 16)
    warps = min(warps, 8)
    stages = 2 if p.block_d * p.bits <= 4096 else 1
    own, other = (own_y, own_x), (other_y, other_x)
    return Tiles(*other, *own, warps, stages) if name == "dkv" else Tiles(*own, *other, warps, stages)


def walk_others(rule: Tiles, name: str) -> list[Tiles]:
    """What else is worth timing: own tiles of half and twice the rows, partners of twice, another pipeline."""
    own, partner = ("KY", "QY") if name == "dkv" else ("QY", "KY")
    rows, tokens = getattr(rule, own), rule.KY * rule.KX if name == "dkv" else rule.QY * rule.QX
    others = [rule._replace(stages=3 - rule.stages)]
    if tokens > 16 and rows > 1:
        others.append(rule._replace(**{own: rows // 2}, warps=max(1, rule.warps // 2)))
    if tokens < 64:
        others.append(rule._replace(**{own: 2 * rows}, warps=min(8, 2 * rule.warps)))
    if rule.QY * rule.QX * rule.KY * rule.KX <= 1024:
        others.append(rule._replace(**{partner: 2 * getattr(rule, partner)}))
    return others


def walk_key(p: Problem, name: str, bias: bool) -> tuple:
    """Sizes count up to 64, and lengths up to 16: tiles look no further."""
    spans = [min(n, 64) for span in (p.rows, p.cols) for n in (span.size, span.stride)]
    lengths = [min(power(n), 16) for n in p.lengths]
    return "attend2d", f"walk_{name}", *spans, *lengths, p.block_d, p.arch, p.dtype, "bias" if bias else "none"


# ---- the arguments -----------------------------------------------------------------------------------------------------


def grid_of(p: Problem, *plans: _spans.Plan) -> tuple[int, dict[str, int]]:
    """How many tiles a head has, and the plans of both axes as kernel arguments."""
    values = {}
    for axis, plan in zip("yx", plans, strict=True):
        values |= {f"origin_{axis}": plan.origin, f"period_{axis}": plan.period, f"per_{axis}": plan.per}
        values[f"tiles_{axis}"] = plan.count
    return p.B * p.rows.step * p.cols.step * plans[0].count * plans[1].count, values


@functools.lru_cache(1024)
def query_grid(p: Problem, tiles: Tiles) -> tuple[int, dict[str, int]]:
    """Tiles of one head and the remaining arguments of a walk whose programs own queries."""
    count, values = grid_of(p, _spans.plan_queries(p.rows, p.H, tiles.QY), _spans.plan_queries(p.cols, p.W, tiles.QX))
    return count, values | walk_constants(p, tiles)


@functools.lru_cache(1024)
def key_grid(p: Problem, tiles: Tiles) -> tuple[int, dict[str, int]]:
    """As `query_grid`, where programs own keys."""
    count, values = grid_of(p, _spans.plan_keys(p.rows, p.H, tiles.KY), _spans.plan_keys(p.cols, p.W, tiles.KX))
    return count, values | walk_constants(p, tiles)


def walk_constants(p: Problem, tiles: Tiles) -> dict[str, int]:
    clamp = {"CLAMP_Y": int(p.rows.edge == "clamp"), "CLAMP_X": int(p.cols.edge == "clamp")}
    sides = dict(zip(("QY", "QX", "KY", "KX"), tiles, strict=False))
    return clamp | sides | {"num_warps": tiles.warps, "num_stages": tiles.stages}


@functools.lru_cache(1024)
def partition_grid(p: Problem, tiles: Whole) -> tuple[int, dict[str, int]]:
    """As `query_grid`. Places in a tile are places in its run, or in each of the RUNS that it holds side by side."""
    runs = max(1, tiles.TX // p.cols.size)
    plans, wraps = [], {}
    for axis, span, n, side in (("y", p.rows, p.H, p.rows.stride), ("x", p.cols, p.W, runs * p.cols.stride)):
        wraps[f"wrap_{axis}"] = 1 << 30
        if tiles.joined and runs == 1 and can_join(span, n):
            wraps[f"wrap_{axis}"] = span.stride - span.shift
            plans.append(_spans.Plan(span.shift, span.stride, 1, (n - span.shift) // span.stride + 1))
        else:
            plans.append(_spans.plan_queries(span, n, side))
    count, values = grid_of(p, *plans)
    values = {name: value for name, value in values.items() if not name.startswith("per_")}
    values |= wraps | {"RUNS": runs, "JOINED": int(min(wraps.values()) < 1 << 30)}
    values |= {"reach_y": p.reach[0], "reach_x": p.reach[1], "TY": tiles.TY, "TX": tiles.TX, "STAGES": tiles.stages}
    return count, values | {"num_warps": tiles.warps}


def table_blocks(p: Problem) -> tuple[int, int, list[tuple[int, int]]]:
    """(EY, EX, first entries) of the blocks in which the bias gradient is summed."""
    full = [2 * reach + 1 for reach in p.reach]
    side = [min(power(n), TABLE_SIDE) for n in full]
    side[1] = max(side[1], 16)
    return *side, [(y, x) for y in range(0, full[0], side[0]) for x in range(0, full[1], side[1])]


def partition_run(tiles: int) -> int:
    """Tiles a program takes one after another: enough to pay for its bias tile, few enough for 2,000 programs."""
    return max(1, min(32, tiles // 2048))
