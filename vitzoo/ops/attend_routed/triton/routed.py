"""Attention from regions of a map to chosen regions of another, keys read where they lie: forward, dq, and dk with dv.

    routed_forward    tiles of a region's queries over the keys that it has chosen                 out, lse
    routed_dq         the same                                                                     delta, dq
    routed_dkv        tiles of a region's keys over the queries of the regions that chose it       dk, dv

Keys are numbered through all chosen regions of a query region, so that one tile takes the few tokens of several regions; the
region of a key is looked up in the index, its place in the map follows. For dk and dv the index is turned around beforehand:
`offsets` says where in `chosen_by` the list of each region begins, whose entries are the regions of queries that chose it, in
order; a region that chose it twice stands there twice. So every sum has one order and there are no atomics.

Dimension letters: Q and K, the tokens of a query tile and of a key tile; D and E, the channels of keys and of values, padded to
BLOCK_D and BLOCK_E. One program is one head; heads are the fastest part of its number. Scores and sums are fp32; p and ds are
rounded to the dtype of the inputs before they enter a product. A choice of a region that does not exist is passed over.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.tokens import LN2, LOG2E, finite, load_tokens, store_tokens

_STRIDES = [f"{t}_{axis}" for t in "qkvg" for axis in "byxn"]
_SIZES = [
    *("tiles", "choices", "index_heads", "regions", "region_cols", "rows", "cols", "width"),
    *("key_regions", "key_region_cols", "key_rows", "key_cols", "key_width"),
]
_ONES = ["heads"]


@triton.jit
def token_of(region, token, region_cols, rows, cols):
    """(row, column) on the map of a token of a region; regions are rows x cols tokens, region_cols of them side by side."""
    return region // region_cols * rows + token // cols, region % region_cols * cols + token % cols


@triton.jit
def chosen_keys(number, index, choices, key_regions, key_region_cols, key_rows, key_cols):
    """(row, column, exists) of the keys with these numbers among those that a region has chosen."""
    area = key_rows * key_cols
    choice = number // area
    region = tl.load(index + choice, mask=choice < choices, other=-1)
    exists = (region >= 0) & (region < key_regions)
    row, col = token_of(tl.where(exists, region, 0), number % area, key_region_cols, key_rows, key_cols)
    return row, col, exists


@triton.jit(do_not_specialize=_SIZES + _STRIDES, do_not_specialize_on_alignment=_ONES)
def routed_forward(
    q, k, v, index, out, lse, scale, heads, tiles, choices, index_heads, regions, region_cols, rows, cols, width,
    key_regions, key_region_cols, key_rows, key_cols, key_width,
    q_b, q_y, q_x, q_n, k_b, k_y, k_x, k_n, v_b, v_y, v_x, v_n,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[B, H, W, N, E]` and lse `[B, H, W, N]` (natural logarithm, fp32), both contiguous.

    q: `[B, H, W, N, D]`, k and v: `[B, Y, X, N, D or E]` by their strides, counted in UNIT elements. index:
    `[B, N or 1, R, K]`, int32, contiguous; index_heads: N or 1. Grid: heads * tiles * regions * B, with tiles of the tokens of
    a region.
    """
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    tile = rest % tiles
    rest = rest // tiles
    region, image = rest % regions, (rest // regions).to(tl.int64)
    token = tile * BQ + tl.arange(0, BQ)
    in_q = token < rows * cols
    row, col = token_of(region, token, region_cols, rows, cols)
    queries = load_tokens(q + (image * q_b + head * q_n) * UNIT, (row * q_y + col * q_x) * UNIT, in_q, D, BLOCK_D)
    index += ((image * index_heads + head % index_heads) * regions + region) * choices
    k += (image * k_b + head * k_n) * UNIT
    v += (image * v_b + head * v_n) * UNIT

    scale2 = scale * LOG2E
    top = tl.full([BQ], -1.0e30, tl.float32)
    total = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, BLOCK_E], tl.float32)
    for at in range(0, choices * key_rows * key_cols, BK):
        y, x, in_k = chosen_keys(at + tl.arange(0, BK), index, choices, key_regions, key_region_cols, key_rows, key_cols)
        keys = load_tokens(k, (y * k_y + x * k_x) * UNIT, in_k, D, BLOCK_D)
        values = load_tokens(v, (y * v_y + x * v_x) * UNIT, in_k, E, BLOCK_E)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2  # [Q, K], in powers of two
        s = tl.where(in_k[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    here = (row * width + col) * heads + head
    tokens = image * (regions * rows * cols) * heads
    store_tokens(out + tokens * E, here * E, in_q, acc * (1.0 / safe)[:, None], E, BLOCK_E)
    tl.store(lse + tokens + here, tl.where(nothing, float("-inf"), (top + tl.log2(safe)) * LN2), mask=in_q)


@triton.jit(do_not_specialize=_SIZES + _STRIDES, do_not_specialize_on_alignment=_ONES)
def routed_dq(
    q, k, v, index, out, lse, grad, dlse, delta, dq, scale, heads, tiles, choices, index_heads, regions, region_cols, rows,
    cols, width, key_regions, key_region_cols, key_rows, key_cols, key_width,
    q_b, q_y, q_x, q_n, k_b, k_y, k_x, k_n, v_b, v_y, v_x, v_n, g_b, g_y, g_x, g_n,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta `[B, H, W, N]` = sum of out * grad over E, less dlse; and dq `[B, H, W, N, D]`. Arguments as in the forward.

    grad: the gradient of out by its strides; dlse: that of lse, or None; the others: contiguous.
    """
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    tile = rest % tiles
    rest = rest // tiles
    region, image = rest % regions, (rest // regions).to(tl.int64)
    token = tile * BQ + tl.arange(0, BQ)
    in_q = token < rows * cols
    row, col = token_of(region, token, region_cols, rows, cols)
    queries = load_tokens(q + (image * q_b + head * q_n) * UNIT, (row * q_y + col * q_x) * UNIT, in_q, D, BLOCK_D)
    do = load_tokens(grad + (image * g_b + head * g_n) * UNIT, (row * g_y + col * g_x) * UNIT, in_q, E, BLOCK_E)
    here = (row * width + col) * heads + head
    tokens = image * (regions * rows * cols) * heads
    o = load_tokens(out + tokens * E, here * E, in_q, E, BLOCK_E)
    less = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        less -= tl.load(dlse + tokens + here, mask=in_q, other=0.0)
    tl.store(delta + tokens + here, less, mask=in_q)
    lse2 = finite(tl.load(lse + tokens + here, mask=in_q, other=0.0))
    index += ((image * index_heads + head % index_heads) * regions + region) * choices
    k += (image * k_b + head * k_n) * UNIT
    v += (image * v_b + head * v_n) * UNIT

    scale2 = scale * LOG2E
    acc = tl.zeros([BQ, BLOCK_D], tl.float32)
    for at in range(0, choices * key_rows * key_cols, BK):
        y, x, in_k = chosen_keys(at + tl.arange(0, BK), index, choices, key_regions, key_region_cols, key_rows, key_cols)
        keys = load_tokens(k, (y * k_y + x * k_x) * UNIT, in_k, D, BLOCK_D)
        values = load_tokens(v, (y * v_y + x * v_x) * UNIT, in_k, E, BLOCK_E)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2
        p = tl.where(in_q[:, None] & in_k[None, :], tl.exp2(s - lse2[:, None]), 0.0)
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        ds = p * (dp - less[:, None])
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    store_tokens(dq + tokens * D, here * D, in_q, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES + _STRIDES, do_not_specialize_on_alignment=_ONES)
def routed_dkv(
    q, k, v, chosen_by, offsets, lse, grad, delta, dk, dv, scale, heads, tiles, choices, index_heads, regions, region_cols,
    rows, cols, width, key_regions, key_region_cols, key_rows, key_cols, key_width,
    q_b, q_y, q_x, q_n, k_b, k_y, k_x, k_n, v_b, v_y, v_x, v_n, g_b, g_y, g_x, g_n,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk `[B, Y, X, N, D]` and dv `[B, Y, X, N, E]`, contiguous; transposed scores `[K, Q]`.

    chosen_by: `[B, N or 1, R * K]`, regions of queries in the order of the regions that they chose; offsets:
    `[B, N or 1, S + 1]`, where each of these begins; int32, contiguous. Grid: heads * tiles * key_regions * B, with tiles of
    the tokens of a region of keys.
    """
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    tile = rest % tiles
    rest = rest // tiles
    region, image = rest % key_regions, (rest // key_regions).to(tl.int64)
    token = tile * BK + tl.arange(0, BK)
    in_k = token < key_rows * key_cols
    row, col = token_of(region, token, key_region_cols, key_rows, key_cols)
    keys = load_tokens(k + (image * k_b + head * k_n) * UNIT, (row * k_y + col * k_x) * UNIT, in_k, D, BLOCK_D)
    values = load_tokens(v + (image * v_b + head * v_n) * UNIT, (row * v_y + col * v_x) * UNIT, in_k, E, BLOCK_E)
    lists = image * index_heads + head % index_heads
    offsets += lists * (key_regions + 1) + region
    begin, end = tl.load(offsets), tl.load(offsets + 1)
    chosen_by += lists * regions * choices
    q += (image * q_b + head * q_n) * UNIT
    grad += (image * g_b + head * g_n) * UNIT
    tokens = image * (regions * rows * cols) * heads + head

    area = rows * cols
    scale2 = scale * LOG2E
    acc_k = tl.zeros([BK, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BK, BLOCK_E], tl.float32)
    for at in range(begin * area, end * area, BQ):
        number = at + tl.arange(0, BQ)
        in_q = number < end * area
        of = tl.load(chosen_by + number // area, mask=in_q, other=0)
        y, x = token_of(of, number % area, region_cols, rows, cols)
        queries = load_tokens(q, (y * q_y + x * q_x) * UNIT, in_q, D, BLOCK_D)  # [Q, BLOCK_D]
        do = load_tokens(grad, (y * g_y + x * g_x) * UNIT, in_q, E, BLOCK_E)
        at_query = (y * width + x) * heads
        lse2 = finite(tl.load(lse + tokens + at_query, mask=in_q, other=0.0))
        less = tl.load(delta + tokens + at_query, mask=in_q, other=0.0)
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale2  # [K, Q]
        p = tl.where(in_k[:, None] & in_q[None, :], tl.exp2(s - lse2[None, :]), 0.0)
        acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - less[None, :])
        acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)

    here = (row * key_width + col) * heads + head
    key_tokens = image * (key_regions * key_rows * key_cols) * heads
    store_tokens(dk + key_tokens * D, here * D, in_k, acc_k * scale, D, BLOCK_D)
    store_tokens(dv + key_tokens * E, here * E, in_k, acc_v, E, BLOCK_E)
