"""Bilinear samples of a map: forward, and the gradients of the points and of the map.

    sample_forward    tiles of points           out
    sample_dpoints    tiles of points           dpoints
    sample_dmap       tiles of the map's tokens over all points    dx

The gradient of the map is a product: the weights of every token and point, computed where they are needed, times the gradients
of the samples. A tile of points none of which lies near a tile of tokens is passed over. So every sum has one order and there
are no atomics; it costs at most as many operations as one of the two products of the attention to these samples.

Dimension letters: S, the points of a tile; T, the tokens of a tile of the map (any flat range of it); C, the channels of a
group in blocks of BLOCK_C. One program is one image and one group. Weights and sums are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.bilinear import cell_of, inside_grid, nearness, position_of
from vitzoo.ops._triton.tokens import load_tokens, store_tokens

_SIZES = ["height", "width", "samples", "tiles", "x_b", "x_y", "x_x", "x_g", "g_b", "g_s", "g_g"]
_ONES = ["groups"]


@triton.jit
def load_points(points, image, group, s, inside, samples, groups, height, width):
    """(row, column) of points among the tokens of the map; points `[B, S, G, 2]`, fp32, contiguous."""
    at = points + image * samples * groups * 2 + (s * groups + group) * 2
    return (
        position_of(tl.load(at, mask=inside, other=0.0), height),
        position_of(tl.load(at + 1, mask=inside, other=0.0), width),
    )


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_ONES)
def sample_forward(
    x, points, out, height, width, samples, groups, tiles, x_b, x_y, x_x, x_g,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """out `[B, S, G, C]`, contiguous; x `[B, H, W, G, C]` by its strides, counted in UNIT elements.

    Grid: groups * blocks of C * tiles * B.
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    group = tl.program_id(0) % groups
    rest = tl.program_id(0) // groups
    c0 = rest % blocks * BLOCK_C
    rest = rest // blocks
    s = rest % tiles * BS + tl.arange(0, BS)
    image = (rest // tiles).to(tl.int64)
    inside = s < samples
    y, u = load_points(points, image, group, s, inside, samples, groups, height, width)
    row, down = cell_of(y)
    col, right = cell_of(u)
    x += (image * x_b + group * x_g) * UNIT
    acc = tl.zeros([BS, BLOCK_C], tl.float32)
    for corner in tl.static_range(4):
        i, j = row + corner // 2, col + corner % 2
        weight = nearness(down, corner // 2) * nearness(right, corner % 2)
        exists = inside & inside_grid(i, j, height, width)
        acc += weight[:, None] * load_tokens(x, (i * x_y + j * x_x) * UNIT, exists, C, BLOCK_C, c0).to(tl.float32)
    store_tokens(out + image * samples * groups * C, (s * groups + group) * C, inside, acc, C, BLOCK_C, c0)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_ONES)
def sample_dpoints(
    x, points, grad, dpoints, height, width, samples, groups, tiles, x_b, x_y, x_x, x_g, g_b, g_s, g_g,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """dpoints `[B, S, G, 2]`, fp32, contiguous; grad: the gradient of out by its strides. Grid: groups * tiles * B."""
    group = tl.program_id(0) % groups
    rest = tl.program_id(0) // groups
    s = rest % tiles * BS + tl.arange(0, BS)
    image = (rest // tiles).to(tl.int64)
    inside = s < samples
    y, u = load_points(points, image, group, s, inside, samples, groups, height, width)
    row, down = cell_of(y)
    col, right = cell_of(u)
    x += (image * x_b + group * x_g) * UNIT
    grad += (image * g_b + group * g_g) * UNIT
    dy = tl.zeros([BS], tl.float32)
    du = tl.zeros([BS], tl.float32)
    for c0 in tl.static_range(0, C, BLOCK_C):
        do = load_tokens(grad, s * g_s * UNIT, inside, C, BLOCK_C, c0).to(tl.float32)
        for corner in tl.static_range(4):
            i, j = row + corner // 2, col + corner % 2
            exists = inside & inside_grid(i, j, height, width)
            token = load_tokens(x, (i * x_y + j * x_x) * UNIT, exists, C, BLOCK_C, c0).to(tl.float32)
            product = tl.sum(do * token, 1)
            dy += (corner // 2 * 2 - 1) * nearness(right, corner % 2) * product
            du += (corner % 2 * 2 - 1) * nearness(down, corner // 2) * product
    at = dpoints + image * samples * groups * 2 + (s * groups + group) * 2
    tl.store(at, dy * 0.5 * (height - 1), mask=inside)
    tl.store(at + 1, du * 0.5 * (width - 1), mask=inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_ONES)
def sample_dmap(
    points, grad, dx, height, width, samples, groups, tiles, g_b, g_s, g_g,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx `[B, H, W, G, C]`, contiguous. Grid: groups * blocks of C * tiles * B."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    group = tl.program_id(0) % groups
    rest = tl.program_id(0) // groups
    c0 = rest % blocks * BLOCK_C
    rest = rest // blocks
    token = rest % tiles * BT + tl.arange(0, BT)
    image = (rest // tiles).to(tl.int64)
    i, j = token // width, token % width
    grad += (image * g_b + group * g_g) * UNIT
    acc = tl.zeros([BT, BLOCK_C], tl.float32)
    for at in range(0, samples, BS):
        s = at + tl.arange(0, BS)
        inside = s < samples
        y, u = load_points(points, image, group, s, inside, samples, groups, height, width)
        weights = nearness(y[None, :], i[:, None]) * nearness(u[None, :], j[:, None])  # [T, S]
        if tl.max(weights) > 0.0:
            do = load_tokens(grad, s * g_s * UNIT, inside, C, BLOCK_C, c0)
            acc = tl.dot(weights, do.to(tl.float32), acc, input_precision=PRECISION)
    dx += image * height * width * groups * C
    store_tokens(dx, (token * groups + group) * C, token < height * width, acc, C, BLOCK_C, c0)
