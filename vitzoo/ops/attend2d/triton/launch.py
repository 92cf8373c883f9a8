"""The launches of a forward and of a backward, from tensors to results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitzoo.ops._triton import tuning
from vitzoo.ops._triton.host import common_strides, common_unit, on_device, power, precision, readable
from vitzoo.ops.attend2d.triton import _spans, choose, partition, walk
from vitzoo.ops.attend2d.triton.choose import Problem, Tiles, Whole
from vitzoo.patterns import Pattern

PARTIALS = 1 << 21  # at most about this many fp32 numbers of bias-gradient partials: 8 MB,
LEAST_PROGRAMS = 512  # but never fewer programs than this for their sake


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out `[B, H, W, N, D]` and lse `[B, H, W, N]`; arguments as those of `attend2d`, already validated and supported."""
    p = choose.problem(q, pattern)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:4], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    bias = None if bias is None else bias.contiguous()
    unit = common_unit(q, k, v)
    shared = {"scale": scale, "UNIT": unit, "PRECISION": precision(p.dtype)}
    shared |= common_strides(unit, "byxn", q=q, k=k, v=v) | choose.geometry(p)

    def by_partition(tiles: Whole) -> None:
        count, plan = choose.partition_grid(p, tiles)
        run = choose.partition_run(count * p.N)
        partition.partition_forward[(p.N * -(-count // run),)](q, k, v, bias, out, lse, **shared, **plan, tiles=count, RUN=run)

    def by_walk(tiles: Tiles) -> None:
        count, plan = choose.query_grid(p, tiles)
        table, wide = wide_table(p, bias, tiles)
        walk.walk_forward[(p.N * count,)](q, k, v, table, out, lse, **shared, **wide, **plan)

    with on_device(q):
        if choose.partitions(p):
            by_partition(partition_tiles(p, "forward", bias, by_partition))
        else:
            by_walk(walk_tiles(p, "forward", bias, by_walk))
    return out, lse


def partition_tiles(p: Problem, name: str, bias: Tensor | None, run: Callable[[Whole], object]) -> Whole:
    """The tiles of a pass of the schedule for partitions, which `run` launches."""
    rule = choose.partition_rule(p, name == "backward")
    key = choose.partition_key(p, name, bias is not None)
    return tuning.choose(key, rule, lambda: choose.partition_others(p, rule), run)


def walk_tiles(p: Problem, name: str, bias: Tensor | None, run: Callable[[Tiles], object]) -> Tiles:
    """The same for the walk."""
    rule = choose.walk_rule(p, name)
    return tuning.choose(choose.walk_key(p, name, bias is not None), rule, lambda: choose.walk_others(rule, name), run)


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv `[B, H, W, N, D]` in the dtype of q, contiguous, and dbias in that of bias (None where there is none).

    grad_out, grad_lse: gradients of out and lse, either may be None. The same call gives the same bits every time.
    """
    p = choose.problem(q, pattern)
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    dbias = torch.zeros(bias.shape, dtype=torch.float32, device=q.device) if bias is not None else None
    if q.numel():
        grad = readable(grad_out, out)
        dlse = None if grad_lse is None else grad_lse.float().contiguous()
        bias = None if bias is None else bias.contiguous()
        run = _partition_backward if choose.partitions_backward(p) else _walk_backward
        with on_device(q):
            run(p, q, k, v, bias, scale, out, lse, grad, dlse, dq, dk, dv, dbias)
    return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype)


def _partition_backward(p, q, k, v, bias, scale, out, lse, grad, dlse, dq, dk, dv, dbias) -> None:
    unit = common_unit(q, k, v, grad)
    EY, EX, blocks = choose.table_blocks(p)  # a table of runs of at most 64 tokens is one block

    def run(tiles: Whole) -> None:
        count, plan = choose.partition_grid(p, tiles)
        each = choose.partition_run(count * p.N)
        programs = -(-count // each)
        partials = None if dbias is None else q.new_empty((programs, p.N, EY, EX), dtype=torch.float32)
        partition.partition_backward[(p.N * programs,)](
            q, k, v, bias, lse, grad, dlse, dq, dk, dv, partials, scale, UNIT=unit, PRECISION=precision(p.dtype),
            **common_strides(unit, "byxn", q=q, k=k, v=v, g=grad), **choose.geometry(p), **plan, tiles=count, RUN=each,
            EY=EY, EX=EX,
        )  # fmt: skip
        if partials is not None:
            sum_into(partials, dbias, *blocks[0])

    run(partition_tiles(p, "backward", bias, run))


def _walk_backward(p, q, k, v, bias, scale, out, lse, grad, dlse, dq, dk, dv, dbias) -> None:
    unit = common_unit(q, k, v, grad)
    shared = {"scale": scale, "UNIT": unit, "PRECISION": precision(p.dtype)}
    shared |= common_strides(unit, "byxn", q=q, k=k, v=v, g=grad) | choose.geometry(p)
    delta = torch.empty_like(lse)
    EY, EX, blocks = choose.table_blocks(p)
    name = "dq" if dbias is None else "dq_dbias"

    def by_queries(tiles: Tiles) -> None:
        count, plan = choose.query_grid(p, tiles)
        table, wide = wide_table(p, bias, tiles)
        run, partials = 1, None
        passes = [(None, True)]  # (first entry of the block of dbias that a pass sums, whether it writes delta and dq)
        if dbias is not None:
            run = -(-count * p.N // max(LEAST_PROGRAMS, PARTIALS // (EY * EX)))
            partials = q.new_empty((-(-count // run), p.N, EY, EX), dtype=torch.float32)
            passes = [(block, number == 0) for number, block in enumerate(blocks)]
            if p.block_d * p.bits >= 4096:  # long rows: dq and dbias together do not fit the registers
                passes = [(None, True), *((block, False) for block in blocks)]
        for block, write in passes:
            y, x = block or (0, 0)
            each = run if block else 1
            walk.walk_dq[(p.N * -(-count // each),)](
                q, k, v, table, out, lse, grad, dlse, delta, dq, partials if block else None,
                **shared, **wide, **plan, tiles=count,
                middle_y=p.reach[0] - y, middle_x=p.reach[1] - x, RUN=each, EY=EY, EX=EX, WRITE_DQ=int(write),
            )  # fmt: skip
            if block:
                sum_into(partials, dbias, y, x)

    def by_keys(tiles: Tiles) -> None:
        count, plan = choose.key_grid(p, tiles)
        table, wide = wide_table(p, bias, tiles)
        walk.walk_dkv[(p.N * count,)](q, k, v, table, lse, grad, delta, dk, dv, **shared, **wide, **plan)

    by_queries(walk_tiles(p, name, bias, by_queries))
    by_keys(walk_tiles(p, "dkv", bias, by_keys))


def wide_table(p: Problem, bias: Tensor | None, tiles: Tiles) -> tuple[Tensor | None, dict[str, int]]:
    """The bias table with margins for `tiles`, and how far it reaches, as the walk's arguments."""
    # partners overshoot their rectangle by less than a tile; queries or keys that do not exist lie up to a tile before it
    margins = tiles.QY + tiles.KY, tiles.QX + tiles.KX
    wide = {f"wide_{axis}": reach + margin for axis, reach, margin in zip("yx", p.reach, margins, strict=True)}
    if bias is None:
        return None, wide
    table = bias.new_empty((p.N, 2 * wide["wide_y"] + 1, 2 * wide["wide_x"] + 2), dtype=torch.float32)
    block = 1024
    _spans.widen_table[(-(-table.numel() // block),)](bias, table, table.numel(), *p.reach, *margins, BLOCK=block)
    return table, wide


def sum_into(partials: Tensor, dbias: Tensor, y: int, x: int) -> None:
    """Sum `[programs, N, EY, EX]` over programs into the block of `dbias` that begins at (y, x): two passes when many."""
    programs, N, EY, EX = partials.shape
    rows, block = 16, min(64, EY * EX)
    group = max(rows, power(programs) >> (power(programs).bit_length() // 2))
    dims = (N, *dbias.shape[1:], y, x, EY, EX, rows, block)
    columns = N * (EY * EX // block)
    if programs > group:
        groups = -(-programs // group)
        fewer = partials.new_empty((groups, N, EY, EX))
        _spans.sum_partials[(groups * columns,)](partials, fewer, programs, group, *dims, FINAL=0)
        partials, programs = fewer, groups
    _spans.sum_partials[(columns,)](partials, dbias, programs, programs, *dims, FINAL=1)
