"""Attention of one token sequence to another, in tiles: forward, dq, dk and dv, and the gradient of a dense bias.

    flash_forward   query tiles over keys                       out, lse
    flash_dq        query tiles over keys                       delta, dq
    flash_dkv       key tiles over queries (roles exchanged)    dk, dv, dkey_bias, dpoints
    flash_dbias     tiles of the bias over what it was spread over (images, heads)

Dimension letters: Q and K, the tokens of a query tile and of a key tile; D, the head dimension, padded to BLOCK_D. One program
is one head; heads are the fastest part of its number, so that heads which share a cache line run side by side. Where tiles are
few (agents as queries, or as keys), the partners are cut into `splits` chunks of `chunk` tokens, each of which writes a part of
its own; the host adds the parts in a fixed order. Scores, softmax and accumulators are fp32; p and ds are rounded to the dtype
of the inputs before they enter a product. There are no atomics. A table that is read at points (`table`, with the parameters
behind it, all of them None or unused otherwise) takes the place of a bias of pairs; its own gradient is `table.flash_dtable`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.tokens import LN2, LOG2E, finite, load_tokens, store_tokens
from vitzoo.ops.attend.triton.table import (
    TABLE_SIZES,
    interpolated,
    key_places,
    points_of,
    query_places,
    row_slope,
    surroundings,
)

# Integers that change with the image or the batch: no value of theirs may cause another compilation.
_SIZES = ["L", "S", "tiles", "chunk", "images", *TABLE_SIZES]
_STRIDES = [f"{t}_{axis}" for t in "qkvg" for axis in "bln"] + ["bias_b", "bias_n", "bias_l", "bias_s", "key_b"]
_ONES = ["heads", "splits"]


@triton.jit
def where_am_i(heads, tiles, splits):
    """(head, tile, split, image) of this program."""
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    tile = rest % tiles
    rest = rest // tiles
    return head, tile, rest % splits, (rest // splits).to(tl.int64)


@triton.jit
def add_biases(scores, rows, cols, in_rows, in_cols, bias, row_stride, col_stride, key_bias, keys, in_keys):
    """Scores `[rows, cols]` in powers of two with both biases; -inf where a key does not exist.

    `rows` and `cols` are token numbers along the two dimensions of the tile, whichever of them is the queries'; `keys` and
    `in_keys` are those of the keys, already spread to `[rows, 1]` or `[1, cols]`.
    """
    if bias is not None:
        at = bias + rows[:, None] * row_stride + cols[None, :] * col_stride
        scores += LOG2E * tl.load(at, mask=in_rows[:, None] & in_cols[None, :], other=0.0).to(tl.float32)
    if key_bias is not None:
        scores += LOG2E * tl.load(key_bias + keys, mask=in_keys, other=0.0).to(tl.float32)
    return tl.where(in_keys, scores, float("-inf"))


@triton.jit(do_not_specialize=_SIZES + _STRIDES, do_not_specialize_on_alignment=_ONES)
def flash_forward(
    q, k, v, bias, key_bias, out, lse, scale, heads, L, S, tiles, splits, chunk, images,
    q_b, q_l, q_n, k_b, k_l, k_n, v_b, v_l, v_n, bias_b, bias_n, bias_l, bias_s, key_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    table=None, points=None, row_at=None, col_at=None, map_width=1, table_height=0, table_width=0, heads_each=1,
):  # fmt: skip
    """out `[splits, B, L, N, D]` and lse `[splits, B, L, N]` (natural logarithm, fp32), both contiguous.

    q: `[B, L, N, D]`, k and v: `[B, S, N, D]` by the strides `*_b, *_l, *_n`, counted in UNIT elements. bias: `[B, N, L, S]` by
    its strides, 0 where it is spread; key_bias: `[B, S]`. Either may be None. table: `[N, table_height, table_width]`, with
    fp32 points `[B, S, G, 2]` and the places row_at, col_at of the queries. Grid: heads * tiles * splits * B.
    """
    head, tile, split, image = where_am_i(heads, tiles, splits)
    rows = tile * BQ + tl.arange(0, BQ)
    in_q = rows < L
    queries = load_tokens(q + (image * q_b + head * q_n) * UNIT, rows * q_l * UNIT, in_q, D, BLOCK_D)  # [Q, BLOCK_D]
    k += (image * k_b + head * k_n) * UNIT
    v += (image * v_b + head * v_n) * UNIT
    if bias is not None:
        bias += image * bias_b + head * bias_n
    if key_bias is not None:
        key_bias += image * key_b
    if table is not None:
        table += head * table_height * table_width
        points = points_of(points, image, head, S, heads, heads_each)
        y, x = query_places(row_at, col_at, rows, in_q, map_width)

    scale2 = scale * LOG2E
    top = tl.full([BQ], -1.0e30, tl.float32)  # finite: a row that sees nothing yet must not give inf - inf
    total = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, BLOCK_D], tl.float32)
    for at in range(split * chunk, tl.minimum((split + 1) * chunk, S), BK):
        cols = at + tl.arange(0, BK)
        in_k = cols < S
        keys = load_tokens(k, cols * k_l * UNIT, in_k, D, BLOCK_D)  # [K, BLOCK_D]
        values = load_tokens(v, cols * v_l * UNIT, in_k, D, BLOCK_D)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2  # [Q, K], in powers of two
        if table is not None:
            key_y, key_x = key_places(points, cols, in_k, heads // heads_each)
            e00, e01, e10, e11, down, right = surroundings(
                table, y[:, None] - key_y[None, :], x[:, None] - key_x[None, :], in_q[:, None] & in_k[None, :],
                table_height, table_width,
            )  # fmt: skip
            s += LOG2E * interpolated(e00, e01, e10, e11, down, right)
        s = add_biases(s, rows, cols, in_q, in_k, bias, bias_l, bias_s, key_bias, cols[None, :], in_k[None, :])
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    token = rows * heads + head
    here = (split * images + image) * L * heads
    store_tokens(out + here * D, token * D, in_q, acc * (1.0 / safe)[:, None], D, BLOCK_D)
    tl.store(lse + here + token, tl.where(nothing, float("-inf"), (top + tl.log2(safe)) * LN2), mask=in_q)


@triton.jit(do_not_specialize=_SIZES + _STRIDES, do_not_specialize_on_alignment=_ONES)
def flash_dq(
    q, k, v, bias, key_bias, out, lse, grad, dlse, delta, dq, scale, heads, L, S, tiles, splits, chunk, images,
    q_b, q_l, q_n, k_b, k_l, k_n, v_b, v_l, v_n, g_b, g_l, g_n, bias_b, bias_n, bias_l, bias_s, key_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    table=None, points=None, row_at=None, col_at=None, map_width=1, table_height=0, table_width=0, heads_each=1,
):  # fmt: skip
    """delta `[B, L, N]` = sum of out * grad over D, less dlse; and dq `[splits, B, L, N, D]`. Arguments as in the forward.

    grad: the gradient of out by the strides `g_b, g_l, g_n`; dlse: that of lse, or None; out, lse, dlse, delta: contiguous.
    """
    head, tile, split, image = where_am_i(heads, tiles, splits)
    rows = tile * BQ + tl.arange(0, BQ)
    in_q = rows < L
    token = rows * heads + head
    here = image * L * heads
    queries = load_tokens(q + (image * q_b + head * q_n) * UNIT, rows * q_l * UNIT, in_q, D, BLOCK_D)  # [Q, BLOCK_D]
    do = load_tokens(grad + (image * g_b + head * g_n) * UNIT, rows * g_l * UNIT, in_q, D, BLOCK_D)
    o = load_tokens(out + here * D, token * D, in_q, D, BLOCK_D)
    less = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        less -= tl.load(dlse + here + token, mask=in_q, other=0.0)
    if split == 0:
        tl.store(delta + here + token, less, mask=in_q)
    lse2 = finite(tl.load(lse + here + token, mask=in_q, other=0.0))
    k += (image * k_b + head * k_n) * UNIT
    v += (image * v_b + head * v_n) * UNIT
    if bias is not None:
        bias += image * bias_b + head * bias_n
    if key_bias is not None:
        key_bias += image * key_b
    if table is not None:
        table += head * table_height * table_width
        points = points_of(points, image, head, S, heads, heads_each)
        y, x = query_places(row_at, col_at, rows, in_q, map_width)

    scale2 = scale * LOG2E
    acc = tl.zeros([BQ, BLOCK_D], tl.float32)
    for at in range(split * chunk, tl.minimum((split + 1) * chunk, S), BK):
        cols = at + tl.arange(0, BK)
        in_k = cols < S
        keys = load_tokens(k, cols * k_l * UNIT, in_k, D, BLOCK_D)  # [K, BLOCK_D]
        values = load_tokens(v, cols * v_l * UNIT, in_k, D, BLOCK_D)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2  # [Q, K]
        if table is not None:
            key_y, key_x = key_places(points, cols, in_k, heads // heads_each)
            e00, e01, e10, e11, down, right = surroundings(
                table, y[:, None] - key_y[None, :], x[:, None] - key_x[None, :], in_q[:, None] & in_k[None, :],
                table_height, table_width,
            )  # fmt: skip
            s += LOG2E * interpolated(e00, e01, e10, e11, down, right)
        s = add_biases(s, rows, cols, in_q, in_k, bias, bias_l, bias_s, key_bias, cols[None, :], in_k[None, :])
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        ds = tl.exp2(s - lse2[:, None]) * (dp - less[:, None])
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    part = (split * images + image) * L * heads
    store_tokens(dq + part * D, token * D, in_q, acc * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=_SIZES + _STRIDES, do_not_specialize_on_alignment=_ONES)
def flash_dkv(
    q, k, v, bias, key_bias, lse, grad, delta, dk, dv, dkey, scale, heads, L, S, tiles, splits, chunk, images,
    q_b, q_l, q_n, k_b, k_l, k_n, v_b, v_l, v_n, g_b, g_l, g_n, bias_b, bias_n, bias_l, bias_s, key_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    table=None, points=None, row_at=None, col_at=None, map_width=1, table_height=0, table_width=0, heads_each=1,
    dpoints=None,
):  # fmt: skip
    """dk, dv `[splits, B, S, N, D]` and, where wanted, dkey `[splits, B, S, N]`, each head's share of the key bias's gradient.

    With a table also dpoints `[splits, B, S, N, 2]`, each head's share. Works on transposed scores `[K, Q]`.
    Here `tiles` are tiles of keys, `chunk` counts queries. Reads delta from `flash_dq`.
    """
    head, tile, split, image = where_am_i(heads, tiles, splits)
    cols = tile * BK + tl.arange(0, BK)
    in_k = cols < S
    keys = load_tokens(k + (image * k_b + head * k_n) * UNIT, cols * k_l * UNIT, in_k, D, BLOCK_D)  # [K, BLOCK_D]
    values = load_tokens(v + (image * v_b + head * v_n) * UNIT, cols * v_l * UNIT, in_k, D, BLOCK_D)
    q += (image * q_b + head * q_n) * UNIT
    grad += (image * g_b + head * g_n) * UNIT
    lse += image * L * heads + head
    delta += image * L * heads + head
    if bias is not None:
        bias += image * bias_b + head * bias_n
    if key_bias is not None:
        key_bias += image * key_b
    if table is not None:
        table += head * table_height * table_width
        points = points_of(points, image, head, S, heads, heads_each)
        y, x = key_places(points, cols, in_k, heads // heads_each)
        dy = tl.zeros([BK], tl.float32)
        dx = tl.zeros([BK], tl.float32)

    scale2 = scale * LOG2E
    acc_k = tl.zeros([BK, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BK, BLOCK_D], tl.float32)
    acc_bias = tl.zeros([BK], tl.float32)
    for at in range(split * chunk, tl.minimum((split + 1) * chunk, L), BQ):
        rows = at + tl.arange(0, BQ)
        in_q = rows < L
        queries = load_tokens(q, rows * q_l * UNIT, in_q, D, BLOCK_D)  # [Q, BLOCK_D]
        do = load_tokens(grad, rows * g_l * UNIT, in_q, D, BLOCK_D)
        lse2 = finite(tl.load(lse + rows * heads, mask=in_q, other=0.0))
        less = tl.load(delta + rows * heads, mask=in_q, other=0.0)
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale2  # [K, Q]
        if table is not None:
            query_y, query_x = query_places(row_at, col_at, rows, in_q, map_width)
            e00, e01, e10, e11, down, right = surroundings(
                table, query_y[None, :] - y[:, None], query_x[None, :] - x[:, None], in_k[:, None] & in_q[None, :],
                table_height, table_width,
            )  # fmt: skip
            s += LOG2E * interpolated(e00, e01, e10, e11, down, right)
        s = add_biases(s, cols, rows, in_k, in_q, bias, bias_s, bias_l, key_bias, cols[:, None], in_k[:, None])
        p = tl.where(in_q[None, :], tl.exp2(s - lse2[None, :]), 0.0)
        acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - less[None, :])
        acc_k = tl.dot(ds.to(queries.dtype), queries, acc_k, input_precision=PRECISION)
        if dkey is not None:
            acc_bias += tl.sum(ds, 1)
        if table is not None:
            dy += tl.sum(ds * row_slope(e00, e01, e10, e11, right), 1)
            dx += tl.sum(ds * row_slope(e00, e10, e01, e11, down), 1)

    token = cols * heads + head
    part = (split * images + image) * S * heads
    store_tokens(dk + part * D, token * D, in_k, acc_k * scale, D, BLOCK_D)
    store_tokens(dv + part * D, token * D, in_k, acc_v, D, BLOCK_D)
    if dkey is not None:
        tl.store(dkey + part + token, acc_bias, mask=in_k)
    if table is not None:  # offsets are query minus key, halved, and (n - 1) / 2 entries are one of their units
        at = dpoints + (part + token) * 2
        tl.store(at, dy * -0.25 * (table_height - 1), mask=in_k)
        tl.store(at + 1, dx * -0.25 * (table_width - 1), mask=in_k)


@triton.jit(
    do_not_specialize=[*_SIZES, *_STRIDES, "to_b", "to_n", "key_tiles", "images_each", "heads_each"],
    do_not_specialize_on_alignment=["heads"],
)
def flash_dbias(
    q, k, v, bias, key_bias, lse, grad, delta, dbias, scale, heads, L, S, tiles, key_tiles, images_each, heads_each,
    q_b, q_l, q_n, k_b, k_l, k_n, v_b, v_l, v_n, g_b, g_l, g_n, bias_b, bias_n, bias_l, bias_s, key_b, to_b, to_n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile `[Q, K]` of dbias (fp32, contiguous `[.., L, S]`): the sum of ds over the images and heads that shared it.

    A program sums `images_each` images (all, or 1) and `heads_each` heads (all, or 1); `to_b`, `to_n`: the strides of dbias, 0
    where it is spread. Grid: key_tiles * tiles * (heads / heads_each) * (B / images_each).
    """
    at_s = tl.program_id(0) % key_tiles
    rest = tl.program_id(0) // key_tiles
    at_l = rest % tiles
    rest = rest // tiles
    groups = heads // heads_each
    first_head, first_image = rest % groups * heads_each, rest // groups * images_each
    rows, cols = at_l * BQ + tl.arange(0, BQ), at_s * BK + tl.arange(0, BK)
    in_q, in_k = rows < L, cols < S
    scale2 = scale * LOG2E
    total = tl.zeros([BQ, BK], tl.float32)
    for number in range(0, images_each * heads_each):
        head = first_head + number % heads_each
        image = (first_image + number // heads_each).to(tl.int64)
        queries = load_tokens(q + (image * q_b + head * q_n) * UNIT, rows * q_l * UNIT, in_q, D, BLOCK_D)  # [Q, BLOCK_D]
        do = load_tokens(grad + (image * g_b + head * g_n) * UNIT, rows * g_l * UNIT, in_q, D, BLOCK_D)
        keys = load_tokens(k + (image * k_b + head * k_n) * UNIT, cols * k_l * UNIT, in_k, D, BLOCK_D)  # [K, BLOCK_D]
        values = load_tokens(v + (image * v_b + head * v_n) * UNIT, cols * v_l * UNIT, in_k, D, BLOCK_D)
        token = image * L * heads + rows * heads + head
        lse2 = finite(tl.load(lse + token, mask=in_q, other=0.0))
        less = tl.load(delta + token, mask=in_q, other=0.0)
        here = bias + image * bias_b + head * bias_n
        sizes = key_bias
        if key_bias is not None:
            sizes = key_bias + image * key_b
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2  # [Q, K]
        s = add_biases(s, rows, cols, in_q, in_k, here, bias_l, bias_s, sizes, cols[None, :], in_k[None, :])
        dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
        total += tl.exp2(s - lse2[:, None]) * (dp - less[:, None])
    at = first_image.to(tl.int64) * to_b + first_head * to_n + rows[:, None] * S + cols[None, :]
    tl.store(dbias + at, total, mask=in_q[:, None] & in_k[None, :])
