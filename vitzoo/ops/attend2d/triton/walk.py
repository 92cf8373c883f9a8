"""Schedule B, the walk: a tile of one residue class steps through the exact rectangle of its partners.

    walk_forward   query tiles over keys                     out, lse
    walk_dq        query tiles over keys                     delta, dq, partials of dbias
    walk_dkv       key tiles over queries (roles exchanged)  dk, dv

Dimension letters: Q and K, the tokens of a query tile `QY x QX` and of a key tile `KY x KX`; D, the head dimension, padded to
BLOCK_D. Columns of partner tiles are the outer loop: the rectangle is nearly always one tile wide, the inner loop keeps its
pipeline, and the column half of the pair test leaves it. One program is one head: heads are the fastest part of its number, so
that heads which share a cache line run side by side. Scores, softmax and accumulators are fp32; p and ds are rounded to the
dtype of the inputs before they enter a product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.tokens import LN2, LOG2E, load_tokens, store_tokens
from vitzoo.ops.attend2d.triton import _spans

# Integers that change with the resolution, the dilation or the batch: no value of theirs may cause another compilation.
_MAP = ["H", "W", "size_y", "size_x", "shift_y", "shift_x", "wide_y", "wide_x", "tiles_y", "tiles_x", "origin_y", "origin_x"]
_STRIDES = [f"{t}_{axis}" for t in "qkvg" for axis in "byxn"]
# A step, a stride or a number of tiles to a run that is 1 is worth a specialisation: divisions disappear.
_ONES = ["heads", "step_y", "step_x", "stride_y", "stride_x", "period_y", "period_x", "per_y", "per_x"]


@triton.jit(do_not_specialize=_MAP + _STRIDES, do_not_specialize_on_alignment=_ONES)
def walk_forward(
    q, k, v, table, out, lse, scale, heads,
    q_b, q_y, q_x, q_n, k_b, k_y, k_x, k_n, v_b, v_y, v_x, v_n,
    H, W, step_y, step_x, size_y, size_x, stride_y, stride_x, shift_y, shift_x, wide_y, wide_x,
    tiles_y, tiles_x, origin_y, origin_x, period_y, period_x, per_y, per_x,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    CLAMP_Y: tl.constexpr, CLAMP_X: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[B, H, W, N, D]` and lse `[B, H, W, N]` (natural logarithm, fp32), both contiguous; one program per query tile.

    q, k, v: `[B, H, W, N, D]` by the strides `*_b .. *_n`, counted in UNIT elements; table: what
    `widen_table` made of the bias, reaching (wide_y, wide_x) positions each way, or None.
    Grid: heads * tiles_x * tiles_y * step_x * step_y * B.
    """
    head = tl.program_id(0) % heads
    ty, tx, ry, rx, b = _spans.unravel(tl.program_id(0) // heads, tiles_y, tiles_x, step_y, step_x)
    rows, cols = (size_y, stride_y, shift_y), (size_x, stride_x, shift_x)
    len_y, len_x = _spans.class_length(H, ry, step_y), _spans.class_length(W, rx, step_x)
    lo_y, first_y, hi_y = _spans.tile_extent(ty, (origin_y, period_y, per_y), len_y, QY)
    lo_x, first_x, hi_x = _spans.tile_extent(tx, (origin_x, period_x, per_x), len_x, QX)

    i = tl.arange(0, QY * QX)
    my, mx = lo_y + i // QX, lo_x + i % QX
    start_y, in_y = _spans.query_runs(my, first_y, hi_y, rows, len_y, CLAMP_Y)
    start_x, in_x = _spans.query_runs(mx, first_x, hi_x, cols, len_x, CLAMP_X)
    in_q = in_y & in_x
    y, x = my * step_y + ry, mx * step_x + rx
    image = b.to(tl.int64)
    queries = load_tokens(q + (image * q_b + head * q_n) * UNIT, (y * q_y + x * q_x) * UNIT, in_q, D, BLOCK_D)  # [Q, BLOCK_D]
    k += (image * k_b + head * k_n) * UNIT
    v += (image * v_b + head * v_n) * UNIT
    width = 2 * wide_x + 2
    if table is not None:
        table += head * (2 * wide_y + 1) * width
    at_my, at_mx = (wide_y - my) * width, wide_x - mx

    scale2 = scale * LOG2E
    top = tl.full([QY * QX], -1.0e30, tl.float32)  # finite: a row that sees nothing yet must not give inf - inf
    total = tl.zeros([QY * QX], tl.float32)
    acc = tl.zeros([QY * QX, BLOCK_D], tl.float32)
    j = tl.arange(0, KY * KX)
    from_y, to_y = _spans.key_bounds(first_y, hi_y, rows, len_y, CLAMP_Y)
    from_x, to_x = _spans.key_bounds(first_x, hi_x, cols, len_x, CLAMP_X)
    for at_x in range(from_x, to_x, KX):
        u = at_x + j % KX
        place_x, in_u = _spans.key_places(u, from_x, to_x)
        sees_x = _spans.sees(place_x[None, :], start_x[:, None], size_x)
        part = _spans.column_part(
            table, at_my[:, None] + (j // KX * width)[None, :], at_mx[:, None] + u[None, :], sees_x, width
        )
        for at_y in range(from_y, to_y, KY):
            w = at_y + j // KX
            place_y, in_w = _spans.key_places(w, from_y, to_y)
            sees_y = _spans.sees(place_y[None, :], start_y[:, None], size_y)
            ky, kx, in_k = w * step_y + ry, u * step_x + rx, in_u & in_w
            keys = load_tokens(k, (ky * k_y + kx * k_x) * UNIT, in_k, D, BLOCK_D)  # [K, BLOCK_D]
            values = load_tokens(v, (ky * v_y + kx * v_x) * UNIT, in_k, D, BLOCK_D)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2  # [Q, K], in powers of two
            s = tl.where(sees_y, _spans.add_part(s, table, part, at_y * width), float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top

    total = tl.where(in_q, total, 1.0)  # nothing is stored there, but 1 / 0 would warn in the interpreter
    token = (y * W + x) * heads + head
    here = image * H * W * heads
    store_tokens(out + here * D, token * D, in_q, acc * (1.0 / total)[:, None], D, BLOCK_D)
    tl.store(lse + here + token, (top + tl.log2(total)) * LN2, mask=in_q)


@triton.jit(
    do_not_specialize=[*_MAP, *_STRIDES, "tiles", "middle_y", "middle_x"], do_not_specialize_on_alignment=[*_ONES, "RUN"]
)
def walk_dq(
    q, k, v, table, out, lse, grad, dlse, delta, dq, partials, scale, heads,
    q_b, q_y, q_x, q_n, k_b, k_y, k_x, k_n, v_b, v_y, v_x, v_n, g_b, g_y, g_x, g_n,
    H, W, step_y, step_x, size_y, size_x, stride_y, stride_x, shift_y, shift_x, wide_y, wide_x,
    tiles_y, tiles_x, origin_y, origin_x, period_y, period_x, per_y, per_x,
    tiles, middle_y, middle_x, RUN,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    CLAMP_Y: tl.constexpr, CLAMP_X: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    EY: tl.constexpr, EX: tl.constexpr, WRITE_DQ: tl.constexpr,
):  # fmt: skip
    """delta `[B, H, W, N]` = sum of out * grad over D, less dlse; dq; and a block of dbias. One program per RUN query tiles.

    grad: `[B, H, W, N, D]` by the strides `g_b .. g_n`, the gradient of out; dlse: that of lse, or None. delta, dq, out, lse:
    contiguous. partials: None or `[programs / heads, heads, EY, EX]` fp32, each program's share of a block of the table
    in which offset (0, 0) has the place (middle_y, middle_x), inside or not. WRITE_DQ 0: only the partials are wanted, for
    a table larger than one block.
    `tiles` is the number of tiles of one head: tiles_x * tiles_y * step_x * step_y * B. Grid: heads * ceil(tiles / RUN).
    """
    head = tl.program_id(0) % heads
    rows, cols = (size_y, stride_y, shift_y), (size_x, stride_x, shift_x)
    i, j = tl.arange(0, QY * QX), tl.arange(0, KY * KX)
    width = 2 * wide_x + 2
    if table is not None:
        table += head * (2 * wide_y + 1) * width
    scale2 = scale * LOG2E
    if partials is not None:
        summed = tl.zeros([EY, EX], tl.float32)

    begin = tl.program_id(0) // heads * RUN
    for tile in range(begin, tl.minimum(begin + RUN, tiles)):
        ty, tx, ry, rx, b = _spans.unravel(tile, tiles_y, tiles_x, step_y, step_x)
        len_y, len_x = _spans.class_length(H, ry, step_y), _spans.class_length(W, rx, step_x)
        lo_y, first_y, hi_y = _spans.tile_extent(ty, (origin_y, period_y, per_y), len_y, QY)
        lo_x, first_x, hi_x = _spans.tile_extent(tx, (origin_x, period_x, per_x), len_x, QX)
        my, mx = lo_y + i // QX, lo_x + i % QX
        start_y, in_y = _spans.query_runs(my, first_y, hi_y, rows, len_y, CLAMP_Y)
        start_x, in_x = _spans.query_runs(mx, first_x, hi_x, cols, len_x, CLAMP_X)
        in_q = in_y & in_x
        y, x = my * step_y + ry, mx * step_x + rx
        image = b.to(tl.int64)
        token = (y * W + x) * heads + head
        here = image * H * W * heads

        queries = load_tokens(
            q + (image * q_b + head * q_n) * UNIT, (y * q_y + x * q_x) * UNIT, in_q, D, BLOCK_D
        )  # [Q, BLOCK_D]
        do = load_tokens(grad + (image * g_b + head * g_n) * UNIT, (y * g_y + x * g_x) * UNIT, in_q, D, BLOCK_D)  # [Q, BLOCK_D]
        o = load_tokens(out + here * D, token * D, in_q, D, BLOCK_D)
        less = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if dlse is not None:
            less -= tl.load(dlse + here + token, mask=in_q, other=0.0)
        if WRITE_DQ:
            tl.store(delta + here + token, less, mask=in_q)
        lse2 = tl.load(lse + here + token, mask=in_q, other=0.0) * LOG2E
        at_my, at_mx = (wide_y - my) * width, wide_x - mx
        k_here = k + (image * k_b + head * k_n) * UNIT
        v_here = v + (image * v_b + head * v_n) * UNIT

        acc = tl.zeros([QY * QX, BLOCK_D], tl.float32)
        from_y, to_y = _spans.key_bounds(first_y, hi_y, rows, len_y, CLAMP_Y)
        from_x, to_x = _spans.key_bounds(first_x, hi_x, cols, len_x, CLAMP_X)
        for at_x in range(from_x, to_x, KX):
            u = at_x + j % KX
            place_x, in_u = _spans.key_places(u, from_x, to_x)
            sees_x = _spans.sees(place_x[None, :], start_x[:, None], size_x)
            part = _spans.column_part(
                table, at_my[:, None] + (j // KX * width)[None, :], at_mx[:, None] + u[None, :], sees_x, width
            )
            for at_y in range(from_y, to_y, KY):
                w = at_y + j // KX
                place_y, in_w = _spans.key_places(w, from_y, to_y)
                sees_y = _spans.sees(place_y[None, :], start_y[:, None], size_y)
                ky, kx, in_k = w * step_y + ry, u * step_x + rx, in_u & in_w
                keys = load_tokens(k_here, (ky * k_y + kx * k_x) * UNIT, in_k, D, BLOCK_D)
                values = load_tokens(v_here, (ky * v_y + kx * v_x) * UNIT, in_k, D, BLOCK_D)
                s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale2  # [Q, K]
                s = _spans.add_part(s, table, part, at_y * width)
                p = tl.where(sees_y, tl.exp2(s - lse2[:, None]), 0.0)
                dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
                ds = (p * (dp - less[:, None])).to(keys.dtype)  # [Q, K]
                if WRITE_DQ:
                    acc = tl.dot(ds, keys, acc, input_precision=PRECISION)
                if partials is not None:
                    dy, dx = at_y - lo_y + middle_y, at_x - lo_x + middle_x
                    summed += _spans.sum_by_offset(ds, QY, QX, KY, KX, dy, dx, EY, EX, PRECISION)
        if WRITE_DQ:
            store_tokens(dq + here * D, token * D, in_q, acc * scale, D, BLOCK_D)

    if partials is not None:
        e = tl.arange(0, EY)[:, None] * EX + tl.arange(0, EX)[None, :]
        tl.store(partials + tl.program_id(0).to(tl.int64) * (EY * EX) + e, summed)


@triton.jit(do_not_specialize=_MAP + _STRIDES, do_not_specialize_on_alignment=_ONES)
def walk_dkv(
    q, k, v, table, lse, grad, delta, dk, dv, scale, heads,
    q_b, q_y, q_x, q_n, k_b, k_y, k_x, k_n, v_b, v_y, v_x, v_n, g_b, g_y, g_x, g_n,
    H, W, step_y, step_x, size_y, size_x, stride_y, stride_x, shift_y, shift_x, wide_y, wide_x,
    tiles_y, tiles_x, origin_y, origin_x, period_y, period_x, per_y, per_x,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr,
    CLAMP_Y: tl.constexpr, CLAMP_X: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv `[B, H, W, N, D]`, contiguous; one program per key tile, which meets exactly the queries that see it.

    Works on transposed scores `[K, Q]`, so that both products that sum over queries take their left side from registers.
    Reads delta `[B, H, W, N]` as `walk_dq` wrote it. Grid: heads * tiles_x * tiles_y * step_x * step_y * B.
    """
    head = tl.program_id(0) % heads
    ty, tx, ry, rx, b = _spans.unravel(tl.program_id(0) // heads, tiles_y, tiles_x, step_y, step_x)
    rows, cols = (size_y, stride_y, shift_y), (size_x, stride_x, shift_x)
    len_y, len_x = _spans.class_length(H, ry, step_y), _spans.class_length(W, rx, step_x)
    lo_y, first_y, hi_y = _spans.tile_extent(ty, (origin_y, period_y, per_y), len_y, KY)
    lo_x, first_x, hi_x = _spans.tile_extent(tx, (origin_x, period_x, per_x), len_x, KX)

    j = tl.arange(0, KY * KX)
    w, u = lo_y + j // KX, lo_x + j % KX
    place_y, in_w = _spans.key_places(w, first_y, hi_y)
    place_x, in_u = _spans.key_places(u, first_x, hi_x)
    in_k = in_w & in_u
    ky, kx = w * step_y + ry, u * step_x + rx
    image = b.to(tl.int64)
    here = image * H * W * heads
    keys = load_tokens(k + (image * k_b + head * k_n) * UNIT, (ky * k_y + kx * k_x) * UNIT, in_k, D, BLOCK_D)  # [K, BLOCK_D]
    values = load_tokens(v + (image * v_b + head * v_n) * UNIT, (ky * v_y + kx * v_x) * UNIT, in_k, D, BLOCK_D)  # [K, BLOCK_D]
    q += (image * q_b + head * q_n) * UNIT
    grad += (image * g_b + head * g_n) * UNIT
    lse += here + head
    delta += here + head
    width = 2 * wide_x + 2
    if table is not None:
        table += head * (2 * wide_y + 1) * width
    at_w, at_u = (wide_y + w) * width, wide_x + u

    scale2 = scale * LOG2E
    acc_k = tl.zeros([KY * KX, BLOCK_D], tl.float32)
    acc_v = tl.zeros([KY * KX, BLOCK_D], tl.float32)
    i = tl.arange(0, QY * QX)
    from_y, to_y = _spans.query_bounds(first_y, hi_y, rows, len_y, CLAMP_Y)
    from_x, to_x = _spans.query_bounds(first_x, hi_x, cols, len_x, CLAMP_X)
    for at_x in range(from_x, to_x, QX):
        mx = at_x + i % QX
        start_x, in_x = _spans.query_runs(mx, from_x, to_x, cols, len_x, CLAMP_X)
        sees_x = _spans.sees(place_x[:, None], start_x[None, :], size_x)
        part = _spans.column_part(table, at_w[:, None] - (i // QX * width)[None, :], at_u[:, None] - mx[None, :], sees_x, width)
        for at_y in range(from_y, to_y, QY):
            my = at_y + i // QX
            start_y, in_y = _spans.query_runs(my, from_y, to_y, rows, len_y, CLAMP_Y)
            sees_y = _spans.sees(place_y[:, None], start_y[None, :], size_y)
            y, x, in_q = my * step_y + ry, mx * step_x + rx, in_y & in_x
            queries = load_tokens(q, (y * q_y + x * q_x) * UNIT, in_q, D, BLOCK_D)  # [Q, BLOCK_D]
            do = load_tokens(grad, (y * g_y + x * g_x) * UNIT, in_q, D, BLOCK_D)
            token = (y * W + x) * heads
            lse2 = tl.load(lse + token, mask=in_q, other=0.0) * LOG2E
            less = tl.load(delta + token, mask=in_q, other=0.0)
            st = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale2  # [K, Q]
            st = _spans.add_part(st, table, part, -at_y * width)
            # lse of a query that is not there reads as 0 and exp2 may overflow: the test decides, not the arithmetic
            pt = tl.where(sees_y, tl.exp2(st - lse2[None, :]), 0.0)
            acc_v = tl.dot(pt.to(do.dtype), do, acc_v, input_precision=PRECISION)
            dpt = tl.dot(values, tl.trans(do), input_precision=PRECISION)
            dst = pt * (dpt - less[None, :])
            acc_k = tl.dot(dst.to(queries.dtype), queries, acc_k, input_precision=PRECISION)

    token = ((ky * W + kx) * heads + head) * D
    store_tokens(dk + here * D, token, in_k, acc_k * scale, D, BLOCK_D)
    store_tokens(dv + here * D, token, in_k, acc_v, D, BLOCK_D)
