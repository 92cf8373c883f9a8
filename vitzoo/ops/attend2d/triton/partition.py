"""Schedule A, partitions: every run of queries sees exactly the run of keys at the same place, and one tile holds it.

    partition_forward    out, lse
    partition_backward   dq, dk, dv and partials of dbias, in one kernel

A program is one head and RUN tiles of it, one after another. Places inside a tile are the same in all of them, cut ones too, so
the bias tile is gathered once per program and stays in registers, and the gradients of the pairs are summed in registers over
all tiles and folded into the table's shape once. Dimension letters: T, the tokens of a tile `TY x TX` (the sides of a run,
rounded up to powers of two); D, the head dimension, padded to BLOCK_D. All arithmetic between the products is fp32.

Two ways to waste less of a tile; neither changes who sees whom:
- Runs that are too small for a product stand side by side, RUNS of them, and pairs of different runs get a bias of -inf.
- Shifted runs may be JOINED: what the border leaves of the first run takes the places of the last run's tile that lie beyond
  the other border, from place `wrap` on. They are the places it has in its own tile, so bias and its gradient do not notice;
  in these tiles alone, pairs must be of one piece.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.tokens import LN2, LOG2E, load_tokens, store_tokens
from vitzoo.ops.attend2d.triton import _spans

_MAP = ["H", "W", "size_y", "size_x", "stride_y", "stride_x", "shift_y", "shift_x", "reach_y", "reach_x"]
_PLAN = ["tiles_y", "tiles_x", "origin_y", "origin_x", "period_y", "period_x", "wrap_y", "wrap_x", "tiles", "RUN"]
_STRIDES = [f"{t}_{axis}" for t in "qkvg" for axis in "byxn"]
_ONES = ["heads", "step_y", "step_x"]


@triton.jit
def pair_tile(
    bias, head, reach_y, reach_x, size_y, size_x, TY: tl.constexpr, TX: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """What is added to the score of every pair of places of a tile, in powers of two: `[query, key]`, fp32, or None."""
    if bias is None and RUNS == 1:
        return None
    else:
        i = tl.arange(0, TY * TX)
        y, run = i // TX, i % TX // size_x
        x = i % TX - run * size_x
        total = tl.zeros([TY * TX, TY * TX], tl.float32)
        if bias is not None:
            ex = 2 * reach_x + 1
            place = y * ex + x
            inside = (y < size_y) & (run < RUNS)
            entry = place[None, :] - place[:, None] + (head * (2 * reach_y + 1) + reach_y) * ex + reach_x
            total = LOG2E * tl.load(bias + entry, mask=inside[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if RUNS > 1:
            total = tl.where(run[:, None] == run[None, :], total, float("-inf"))
        return total


@triton.jit
def tile_tokens(
    tile, H, W, step_y, step_x, tiles_y, tiles_x, plan_y, plan_x, size_y, size_x, wrap_y, wrap_x,
    TY: tl.constexpr, TX: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    """Tile number -> (image, y `[T]`, x `[T]`, which tokens exist `[T]`, of which piece they are `[T]`, has it several)."""
    ty, tx, ry, rx, b = _spans.unravel(tile, tiles_y, tiles_x, step_y, step_x)
    lo_y, first_y, hi_y = _spans.tile_extent(ty, plan_y, _spans.class_length(H, ry, step_y), TY)
    lo_x, first_x, hi_x = _spans.tile_extent(tx, plan_x, _spans.class_length(W, rx, step_x), TX)
    i = tl.arange(0, TY * TX)
    my, mx = lo_y + i // TX, lo_x + i % TX
    in_y, in_x = (my >= first_y) & (my < hi_y), (mx >= first_x) & (mx < hi_x)
    piece = 0
    if JOINED:
        last_y, last_x = ty == tiles_y - 1, tx == tiles_x - 1
        other_y = last_y & (i // TX >= wrap_y) & (i // TX < size_y)
        other_x = last_x & (i % TX >= wrap_x) & (i % TX < size_x)
        my, mx = tl.where(other_y, i // TX - wrap_y, my), tl.where(other_x, i % TX - wrap_x, mx)
        in_y, in_x = in_y | other_y, in_x | other_x
        piece = other_y.to(tl.int32) * 2 + other_x.to(tl.int32)
        several = last_y | last_x
    else:
        several = False
    return b.to(tl.int64), my * step_y + ry, mx * step_x + rx, in_y & in_x, piece, several


@triton.jit(do_not_specialize=_MAP + _PLAN + _STRIDES, do_not_specialize_on_alignment=_ONES)
def partition_forward(
    q, k, v, bias, out, lse, scale, heads,
    q_b, q_y, q_x, q_n, k_b, k_y, k_x, k_n, v_b, v_y, v_x, v_n,
    H, W, step_y, step_x, size_y, size_x, stride_y, stride_x, shift_y, shift_x, reach_y, reach_x,
    tiles_y, tiles_x, origin_y, origin_x, period_y, period_x, wrap_y, wrap_x, tiles, RUN,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, RUNS: tl.constexpr, JOINED: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out `[B, H, W, N, D]` and lse `[B, H, W, N]` (natural logarithm, fp32), both contiguous.

    q, k, v: `[B, H, W, N, D]` by the strides `*_b .. *_n`, counted in UNIT elements; bias: `[N, 2*reach_y+1, 2*reach_x+1]`
    or None. `tiles` is the number of tiles of one head. Grid: heads * ceil(tiles / RUN).
    """
    head = tl.program_id(0) % heads
    pair_bias = pair_tile(bias, head, reach_y, reach_x, size_y, size_x, TY, TX, RUNS)
    scale2 = scale * LOG2E
    begin = tl.program_id(0) // heads * RUN
    for tile in tl.range(begin, tl.minimum(begin + RUN, tiles), num_stages=STAGES):
        image, y, x, inside, piece, several = tile_tokens(
            tile, H, W, step_y, step_x, tiles_y, tiles_x, (origin_y, period_y, 1), (origin_x, period_x, 1),
            size_y, size_x, wrap_y, wrap_x, TY, TX, JOINED,
        )  # fmt: skip
        queries = load_tokens(
            q + (image * q_b + head * q_n) * UNIT, (y * q_y + x * q_x) * UNIT, inside, D, BLOCK_D
        )  # [T, BLOCK_D]
        keys = load_tokens(k + (image * k_b + head * k_n) * UNIT, (y * k_y + x * k_x) * UNIT, inside, D, BLOCK_D)
        values = load_tokens(v + (image * v_b + head * v_n) * UNIT, (y * v_y + x * v_x) * UNIT, inside, D, BLOCK_D)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2  # [T, T], in powers of two
        if pair_bias is not None:
            s += pair_bias
        s = tl.where(inside[None, :], s, -1.0e30)  # finite: a tile without tokens must not give inf - inf
        if JOINED:  # noqa: SIM102  the inner one is a branch of the GPU
            if several:
                s = tl.where(piece[:, None] == piece[None, :], s, -1.0e30)
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        o = tl.dot(p.to(values.dtype), values, input_precision=PRECISION) * (1.0 / total)[:, None]
        token = (y * W + x) * heads + head
        here = image * H * W * heads
        store_tokens(out + here * D, token * D, inside, o, D, BLOCK_D)
        tl.store(lse + here + token, (top + tl.log2(total)) * LN2, mask=inside)


@triton.jit(do_not_specialize=_MAP + _PLAN + _STRIDES, do_not_specialize_on_alignment=_ONES)
def partition_backward(
    q, k, v, bias, lse, grad, dlse, dq, dk, dv, partials, scale, heads,
    q_b, q_y, q_x, q_n, k_b, k_y, k_x, k_n, v_b, v_y, v_x, v_n, g_b, g_y, g_x, g_n,
    H, W, step_y, step_x, size_y, size_x, stride_y, stride_x, shift_y, shift_x, reach_y, reach_x,
    tiles_y, tiles_x, origin_y, origin_x, period_y, period_x, wrap_y, wrap_x, tiles, RUN,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr, RUNS: tl.constexpr, JOINED: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, EY: tl.constexpr, EX: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv `[B, H, W, N, D]`, contiguous, and partials of dbias `[programs / heads, heads, EY, EX]` (or None).

    A tile holds all the keys of its queries, so the sum of out * grad over D is the row sum of p * dp: out is not read at all.
    grad, dlse: gradients of out (by strides) and of lse (contiguous, or None).
    """
    head = tl.program_id(0) % heads
    pair_bias = pair_tile(bias, head, reach_y, reach_x, size_y, size_x, TY, TX, RUNS)
    if partials is not None:
        pairs = tl.zeros([TY * TX, TY * TX], tl.float32)
    scale2 = scale * LOG2E
    begin = tl.program_id(0) // heads * RUN
    for tile in tl.range(begin, tl.minimum(begin + RUN, tiles), num_stages=STAGES):
        image, y, x, inside, piece, several = tile_tokens(
            tile, H, W, step_y, step_x, tiles_y, tiles_x, (origin_y, period_y, 1), (origin_x, period_x, 1),
            size_y, size_x, wrap_y, wrap_x, TY, TX, JOINED,
        )  # fmt: skip
        token = (y * W + x) * heads + head
        here = image * H * W * heads
        queries = load_tokens(
            q + (image * q_b + head * q_n) * UNIT, (y * q_y + x * q_x) * UNIT, inside, D, BLOCK_D
        )  # [T, BLOCK_D]
        keys = load_tokens(k + (image * k_b + head * k_n) * UNIT, (y * k_y + x * k_x) * UNIT, inside, D, BLOCK_D)
        values = load_tokens(v + (image * v_b + head * v_n) * UNIT, (y * v_y + x * v_x) * UNIT, inside, D, BLOCK_D)
        do = load_tokens(grad + (image * g_b + head * g_n) * UNIT, (y * g_y + x * g_x) * UNIT, inside, D, BLOCK_D)
        # of a query that is not there: so large that its probabilities are zero without a mask
        lse2 = tl.load(lse + here + token, mask=inside, other=1.0e30) * LOG2E
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2
        if pair_bias is not None:
            s += pair_bias
        p = tl.where(inside[None, :], tl.exp2(s - lse2[:, None]), 0.0)
        if JOINED:  # noqa: SIM102  the inner one is a branch of the GPU
            if several:
                p = tl.where(piece[:, None] == piece[None, :], p, 0.0)
        # where scores are sharp (Swin V2's reach 100) lse is rounded by so much that p would not sum to 1
        p = p / tl.maximum(tl.sum(p, 1), 1.0e-30)[:, None]
        d_values = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        store_tokens(dv + here * D, token * D, inside, d_values, D, BLOCK_D)
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        less = tl.sum(p * dp, 1)
        if dlse is not None:
            less -= tl.load(dlse + here + token, mask=inside, other=0.0)
        ds = p * (dp - less[:, None])
        if partials is not None:
            pairs += ds
        half = ds.to(queries.dtype)
        d_queries = tl.dot(half, keys, input_precision=PRECISION) * scale
        store_tokens(dq + here * D, token * D, inside, d_queries, D, BLOCK_D)
        d_keys = tl.dot(tl.trans(half), queries, input_precision=PRECISION) * scale
        store_tokens(dk + here * D, token * D, inside, d_keys, D, BLOCK_D)

    if partials is not None:
        # once per program: fp32 accuracy costs nothing here
        table = _spans.sum_by_offset(pairs, TY, TX, TY, TX, reach_y, reach_x, EY, EX, "tf32x3")
        e = tl.arange(0, EY)[:, None] * EX + tl.arange(0, EX)[None, :]
        tl.store(partials + tl.program_id(0).to(tl.int64) * (EY * EX) + e, table)
