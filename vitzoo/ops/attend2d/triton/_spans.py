"""The span rule of `vitzoo.patterns` as jit functions, and the plan of tiles that goes with it: once, for all kernels.

Kernels count positions m inside one residue class of an axis, exactly as `Span` does. An axis travels through them as the
tuple `span = (size, stride, shift)` and a `length`; a tile of it as `lo` (may be negative), `first = max(lo, 0)` and `hi`.

A pair is tested the same way everywhere: `(key - start(query)) as unsigned < size` on both axes. Positions that do not exist
are moved so far away that this test fails for them: no second mask is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from vitzoo.ops._triton.tokens import LOG2E
from vitzoo.patterns import Span

LEAST_K = tl.constexpr(8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16)  # of an fp32 product
NO_KEY = tl.constexpr(1 << 30)  # a key that is not there lies beyond every run,
NO_QUERY = tl.constexpr(-(1 << 30))  # and the run of a query that is not there begins below every key


# ---- who sees whom -------------------------------------------------------------------------------------------------------


@triton.jit
def run_start(m, span, length, CLAMP: tl.constexpr):
    """First key position that query position `m` sees (`Span.start`)."""
    size, stride, shift = span
    # `//` truncates on the device: one stride more keeps what it divides from being negative (shift < stride, m >= 0)
    start = ((m - shift + stride) // stride - 1) * stride + shift + stride // 2 - size // 2
    if CLAMP:
        start = tl.maximum(tl.minimum(start, length - size), 0)
    return start


@triton.jit
def key_bounds(first, hi, span, length, CLAMP: tl.constexpr):
    """The key positions [start, stop) that some query position in [first, hi) sees; exact, since starts are monotone."""
    start = tl.maximum(run_start(first, span, length, CLAMP), 0)
    stop = tl.minimum(run_start(tl.maximum(hi - 1, 0), span, length, CLAMP) + span[0], length)
    return start, tl.where(first < hi, stop, start)


@triton.jit
def query_bounds(first, hi, span, length, CLAMP: tl.constexpr):
    """The query positions [start, stop) that see some key position in [first, hi) (`Span.first` and `Span.end`)."""
    size, stride, shift = span
    base = shift + stride // 2 - size // 2
    lift = (size // stride + 3) * stride  # again: nothing negative is divided
    last = tl.maximum(hi - 1, 0)
    start = tl.maximum(((first - size - base + lift) // stride + 1) * stride - lift + shift, 0)
    stop = tl.minimum(((last - base + lift) // stride + 1) * stride - lift + shift, length)
    if CLAMP:
        start = tl.where(first < size, 0, start)
        stop = tl.where(last >= length - size, length, stop)
    return start, tl.where(first < hi, stop, start)


@triton.jit
def query_runs(m, first, hi, span, length, CLAMP: tl.constexpr):
    """Where the runs of the query positions `m` start; those outside [first, hi) see nothing."""
    inside = (m >= first) & (m < hi)
    # the rule is evaluated at a position that exists, whatever m is
    return tl.where(inside, run_start(tl.where(inside, m, first), span, length, CLAMP), NO_QUERY), inside


@triton.jit
def key_places(m, first, hi):
    """The key positions `m`, those outside [first, hi) moved to where nobody sees them."""
    inside = (m >= first) & (m < hi)
    return tl.where(inside, m, NO_KEY), inside


@triton.jit
def sees(key, start, size):
    """Whether `key` lies in the run [start, start + size)."""
    return (key - start).to(tl.uint32, bitcast=True) < size


# ---- where a program works -----------------------------------------------------------------------------------------------


@triton.jit
def unravel(tile, tiles_y, tiles_x, step_y, step_x):
    """Flat number of a tile -> (tile row, tile column, residue row, residue column, image)."""
    row = tile // tiles_x  # each division is written once: a remainder would be another
    tx = tile - row * tiles_x
    rest = row // tiles_y
    ty = row - rest * tiles_y
    ry = rest // step_x
    rx = rest - ry * step_x
    b = ry // step_y
    return ty, tx, ry - b * step_y, rx, b


@triton.jit
def tile_extent(t, plan, length, BLOCK: tl.constexpr):
    """Tile number `t` of an axis: (lo, first, hi), see the top of this module."""
    origin, period, per = plan
    run = t // per
    begin = origin + run * period
    lo = begin + (t - run * per) * BLOCK
    hi = tl.minimum(tl.minimum(lo + BLOCK, begin + period), length)
    return lo, tl.maximum(lo, 0), hi


@triton.jit
def class_length(n, r, step):
    """How many of `n` coordinates leave residue `r` (`Span.length`)."""
    return (n - r + step - 1) // step


# ---- the bias and the mask of a pair -------------------------------------------------------------------------------------
#
# In the walk the column half of the pair test does not change in the inner loop, and neither does the column of the bias. Both
# are prepared as one `part` per pair, so that a step pays one multiply-add for scale, bias and half of the mask:
#     without bias   part = 0 or -inf
#     with bias      part = index into the wide table, whose last column holds -inf


@triton.jit
def column_part(table, rows, cols, sees_x, width):
    """Everything about the pairs `[a, b]` that stays while their rows move: see above. `rows`, `cols`: table indices."""
    if table is None:
        return tl.where(sees_x, 0.0, float("-inf"))
    else:  # a constexpr branch: Triton compiles what follows a bare `if` too
        return rows + tl.where(sees_x, cols, width - 1)


@triton.jit
def add_part(scores, table, part, at):
    """Scores (in powers of two) with bias and column mask; `at` is how far the rows have moved in the table."""
    if table is None:
        return scores + part
    else:
        return scores + tl.load(table + at + part)


@triton.jit(do_not_specialize=["reach_y", "reach_x", "margin_y", "margin_x", "total"])
def widen_table(bias, wide, total, reach_y, reach_x, margin_y, margin_x, BLOCK: tl.constexpr):
    """`[N, 2*reach_y+1, 2*reach_x+1]` -> fp32 `[N, 2*(reach_y+margin_y)+1, 2*(reach_x+margin_x)+2]`, in powers of two.

    The margin is so wide that no pair of two tiles points outside: gathers then need no mask. The last column is -inf.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    width, height = 2 * (reach_x + margin_x) + 2, 2 * (reach_y + margin_y) + 1
    row = i // width
    n = row // height
    y, x = row - n * height - margin_y, i - row * width - margin_x
    inside = (y >= 0) & (y <= 2 * reach_y) & (x >= 0) & (x <= 2 * reach_x) & (i < total)
    entry = (n * (2 * reach_y + 1) + y) * (2 * reach_x + 1) + x
    value = tl.load(bias + entry, mask=inside, other=0.0).to(tl.float32) * LOG2E
    tl.store(wide + i, tl.where(x + margin_x == width - 1, float("-inf"), value), mask=i < total)


# ---- the gradient of the bias table --------------------------------------------------------------------------------------


@triton.jit
def sum_by_offset(
    ds, QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, dy, dx,
    EY: tl.constexpr, EX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pair gradients `[QY*QX, KY*KX]` -> `[EY, EX]`: the sums over pairs with equal (row, column) offset.

    The entry of a pair is place of the key - place of the query + (dy, dx); pairs whose entry lies outside are left out. Two
    products with one-hot matrices: the order of the sum is fixed, and there are no atomics.
    """
    by_row = ds.reshape(QY, QX, KY, KX).permute(0, 2, 1, 3).reshape(QY * KY, QX * KX)
    c = tl.arange(0, QX * KX)
    ex = tl.arange(0, EX)
    hot_x = (c % KX - c // KX + dx)[:, None] == ex[None, :]
    rows = tl.dot(by_row, hot_x.to(ds.dtype), input_precision=PRECISION)  # [QY*KY, EX] fp32
    r = tl.arange(0, QY * KY)
    ey = tl.arange(0, EY)
    hot_y = (r % KY - r // KY + dy)[None, :] == ey[:, None]
    if QY * KY >= LEAST_K:
        # the one-hot side is exact in any precision; three TF32 products keep 22 bits of the other one
        return tl.dot(hot_y.to(tl.float32), rows, input_precision="tf32x3")
    else:
        return tl.sum(hot_y.to(tl.float32)[:, :, None] * rows[None, :, :], 1)


@triton.jit(do_not_specialize=["programs", "group", "table_y", "table_x", "block_y", "block_x"])
def sum_partials(
    partials, table, programs, group, heads, table_y, table_x, block_y, block_x,
    EY: tl.constexpr, EX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Sums `group` neighbouring partials `[programs, heads, EY, EX]` (fp32), in an order that only the shape decides.

    FINAL 0: to `table` `[programs / group, heads, EY, EX]`, for another pass. FINAL 1 (one group): to the block of `table`
    `[heads, table_y, table_x]` that begins at (block_y, block_x). Grid: groups * heads * (EY * EX / BLOCK).
    """
    blocks: tl.constexpr = EY * EX // BLOCK
    e = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // blocks % heads
    number = tl.program_id(0) // blocks // heads
    r = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    end = tl.minimum((number + 1) * group, programs)
    for p in range(number * group, end, ROWS):
        row = (p + r).to(tl.int64) * heads + head
        total += tl.load(partials + row[:, None] * (EY * EX) + e[None, :], mask=(p + r < end)[:, None], other=0.0)
    if FINAL:
        y, x = e // EX + block_y, e % EX + block_x
        tl.store(table + (head * table_y + y) * table_x + x, tl.sum(total, 0), mask=(y < table_y) & (x < table_x))
    else:
        tl.store(table + (number * heads + head) * (EY * EX) + e, tl.sum(total, 0))


# ---- planning on the host ------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How one axis is cut: tile t begins at `origin + t // per * period + t % per * block` and ends within its period."""

    origin: int
    period: int
    per: int
    count: int


def plan_tiles(span: Span, n: int, block: int, anchor: int) -> Plan:
    """Tiles of at most `block` positions whose borders fall on `anchor` modulo the stride.

    Queries that share a run then share a tile, or a run is cut into tiles of its own: no tile meets more runs than it must.
    """
    stride = span.stride
    length = -(-n // span.step)
    period = stride if stride > block else block // stride * stride
    per = -(-period // block)
    origin = anchor % stride - stride if anchor % stride else 0
    whole, rest = divmod(length - origin, period)
    return Plan(origin, period, per, whole * per + -(-rest // block))


def plan_queries(span: Span, n: int, block: int) -> Plan:
    """Query tiles begin where runs of queries begin."""
    return plan_tiles(span, n, block, span.shift)


def plan_keys(span: Span, n: int, block: int) -> Plan:
    """Key tiles begin where the fewest runs overlap: an eight-wide key tile of halo(8, 3) is seen by 16 queries, not 24."""
    return plan_tiles(span, n, block, span.base + span.size - span.stride)


def seen_width(span: Span, n: int, block: int) -> int:
    """Bound on how many positions, on one axis, see or are seen by a planned tile of `block`, away from clamped borders."""
    runs = max(1, block // span.stride)
    return min((runs - 1) * span.stride + span.size, -(-n // span.step))
