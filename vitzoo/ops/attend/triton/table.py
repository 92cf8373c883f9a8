"""A `PointBias` in registers: the table is read between its entries for every pair of a tile, never written for all pairs.

    flash_dtable    blocks of the table over pairs of an image and a key    parts of dtable

The gradient of a table adds, for one image and one key, the matrix of ds `[rows, columns]` of the queries, times how near their
columns lie to the columns of the table, times how near their rows lie to its rows: two small products. So it needs no atomics;
every program sums a run of images and keys, and the host adds the programs' parts in a fixed order.

Offsets are query minus key, as published, so the table is read from its end. Dimension letters: Q and K as in `flash`; QY and
QX, rows and columns of a tile of queries; TY and TX, of a block of the table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.bilinear import cell_of, inside_grid, nearness, position_of
from vitzoo.ops._triton.tokens import LOG2E, finite, load_tokens

TABLE_SIZES = ["map_width", "table_height", "table_width", "heads_each"]


@triton.jit
def points_of(points, image, head, S, heads, heads_each):
    """The first point of a head's group in an image; points `[B, S, G, 2]`, fp32, contiguous."""
    return points + (image * S * (heads // heads_each) + head // heads_each) * 2


@triton.jit
def key_places(points, keys, inside, groups):
    """(row, column) of keys, in units of the map."""
    at = points + keys * groups * 2
    return tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)


@triton.jit
def query_places(row_at, col_at, queries, inside, map_width):
    """(row, column) of queries, which are tokens of a map of so many columns; fp32."""
    return (
        tl.load(row_at + queries // map_width, mask=inside, other=0.0),
        tl.load(col_at + queries % map_width, mask=inside, other=0.0),
    )


@triton.jit
def surroundings(table, y, x, exists, height, width):
    """The four entries around offsets (query minus key, in units of the map) and how far behind the first they lie."""
    row, down = cell_of(position_of(y * 0.5, height))
    col, right = cell_of(position_of(x * 0.5, width))
    at = table + (height * width - 1) - (row * width + col)
    e00 = tl.load(at, mask=exists & inside_grid(row, col, height, width), other=0.0)
    e01 = tl.load(at - 1, mask=exists & inside_grid(row, col + 1, height, width), other=0.0)
    e10 = tl.load(at - width, mask=exists & inside_grid(row + 1, col, height, width), other=0.0)
    e11 = tl.load(at - width - 1, mask=exists & inside_grid(row + 1, col + 1, height, width), other=0.0)
    return e00.to(tl.float32), e01.to(tl.float32), e10.to(tl.float32), e11.to(tl.float32), down, right


@triton.jit
def interpolated(e00, e01, e10, e11, down, right):
    """The bias."""
    above = e00 + right * (e01 - e00)
    return above + down * (e10 + right * (e11 - e10) - above)


@triton.jit
def row_slope(e00, e01, e10, e11, right):
    """How the bias changes with the row of the table; with e01 and e10 exchanged and `down`, with the column."""
    return e10 - e00 + right * (e11 - e10 - e01 + e00)


_STRIDES = [f"{t}_{axis}" for t in "qkvg" for axis in "bln"] + ["key_b"]


@triton.jit(
    do_not_specialize=["L", "S", "pairs", "chunk", "blocks_x", "blocks", *TABLE_SIZES, *_STRIDES],
    do_not_specialize_on_alignment=["heads"],
)
def flash_dtable(
    q, k, v, key_bias, lse, grad, delta, parts, scale, heads, L, S, pairs, chunk, blocks, blocks_x,
    q_b, q_l, q_n, k_b, k_l, k_n, v_b, v_l, v_n, g_b, g_l, g_n, key_b,
    table, points, row_at, col_at, map_width, table_height, table_width, heads_each,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QY: tl.constexpr, QX: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts `[programs of a block, N, R, C]`, fp32, contiguous; the others as in `flash`. A pair is one image and one key.

    A program takes `chunk` of the pairs. Grid: heads * blocks * ceil(pairs / chunk).
    """
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    block, part = rest % blocks, (rest // blocks).to(tl.int64)
    entry_y = block // blocks_x * TY + tl.arange(0, TY)
    entry_x = block % blocks_x * TX + tl.arange(0, TX)
    table += head * table_height * table_width
    map_height = L // map_width
    tiles_x = (map_width + QX - 1) // QX
    tiles = (map_height + QY - 1) // QY * tiles_x
    local = tl.arange(0, QY * QX)
    d = tl.arange(0, BLOCK_D)
    scale2 = scale * LOG2E
    acc = tl.zeros([TY, TX], tl.float32)
    for step in range(part * chunk * tiles, tl.minimum((part + 1) * chunk, pairs) * tiles):
        pair, tile = step // tiles, step % tiles
        image, s = pair // S, (pair % S).to(tl.int32)
        i0, j0 = (tile // tiles_x).to(tl.int32) * QY, (tile % tiles_x).to(tl.int32) * QX
        at = points_of(points, image, head, S, heads, heads_each) + s * (heads // heads_each) * 2
        py, px = tl.load(at), tl.load(at + 1)
        row, col = i0 + tl.arange(0, QY), j0 + tl.arange(0, QX)
        near_y = position_of((tl.load(row_at + row, mask=row < map_height, other=1e9) - py) * 0.5, table_height)
        near_x = position_of((tl.load(col_at + col, mask=col < map_width, other=1e9) - px) * 0.5, table_width)
        by_row = nearness(near_y[None, :], entry_y[:, None])  # [TY, QY]
        by_col = nearness(near_x[:, None], entry_x[None, :])  # [QX, TX]
        if (tl.max(by_row) > 0.0) & (tl.max(by_col) > 0.0):
            i, j = i0 + local // QX, j0 + local % QX
            token = i * map_width + j
            in_q = (i < map_height) & (j < map_width)
            queries = load_tokens(q + (image * q_b + head * q_n) * UNIT, token * q_l * UNIT, in_q, D, BLOCK_D)
            do = load_tokens(grad + (image * g_b + head * g_n) * UNIT, token * g_l * UNIT, in_q, D, BLOCK_D)
            key = tl.load(k + (image * k_b + s * k_l + head * k_n) * UNIT + d, mask=d < D, other=0.0)
            value = tl.load(v + (image * v_b + s * v_l + head * v_n) * UNIT + d, mask=d < D, other=0.0)
            y, x = query_places(row_at, col_at, token, in_q, map_width)
            e00, e01, e10, e11, down, right = surroundings(table, y - py, x - px, in_q, table_height, table_width)
            scores = tl.sum(queries.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale2
            scores += LOG2E * interpolated(e00, e01, e10, e11, down, right)
            if key_bias is not None:
                scores += LOG2E * tl.load(key_bias + image * key_b + s).to(tl.float32)
            dp = tl.sum(do.to(tl.float32) * value.to(tl.float32)[None, :], 1)
            here = image * L * heads + token * heads + head
            lse2 = finite(tl.load(lse + here, mask=in_q, other=0.0))
            less = tl.load(delta + here, mask=in_q, other=0.0)
            ds = tl.where(in_q, tl.exp2(scores - lse2) * (dp - less), 0.0)
            spread = tl.dot(tl.reshape(ds, [QY, QX]), by_col, input_precision=PRECISION)  # [QY, TX]
            acc = tl.dot(by_row, spread, acc, input_precision=PRECISION)

    size = table_height * table_width
    entry = size - 1 - (entry_y[:, None] * table_width + entry_x[None, :])
    exists = (entry_y < table_height)[:, None] & (entry_x < table_width)[None, :]
    tl.store(parts + (part * heads + head) * size + entry, acc, mask=exists)
