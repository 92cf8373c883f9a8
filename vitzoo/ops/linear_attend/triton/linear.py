"""Queries that meet keys summed before: forward, and the gradient of the queries with what the keys' needs from it.

    linear_out    out, norm
    linear_dq     dq, and the two weights with which queries are summed to the gradient of what keys were summed to

The other passes are those of `vitzoo.ops._triton.products`. With M = k^T v / S `[D, E]` and m = the mean of k `[D]`:

    norm = q . m + eps          out = q M / norm
    dq = (dout M^T - (out . dout) m) / norm
    dM = sum of (1 / norm) q^T dout          dm = sum of -(out . dout / norm) q
    dk = (v dM^T + dm) / S          dv = k dM / S

Dimension letters as there: T, the tokens of a tile; BD and BE, blocks of D and of E.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.products import load_matrix, rows_times
from vitzoo.ops._triton.tokens import load_tokens, store_tokens

_SIZES = ["tokens", "tiles", "q_b", "q_t", "q_n", "g_b", "g_t", "g_n"]
_ONES = ["heads"]


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_ONES)
def linear_out(
    q, matrix, mean, out, norm, eps, heads, tokens, tiles, q_b, q_t, q_n,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out `[B, L, N, E]` and norm `[B, L, N]` (fp32), contiguous; q `[B, L, N, D]` by its strides, counted in UNIT elements.

    matrix `[B, N, D, E]` and mean `[B, N, D]`: fp32, contiguous. Grid: heads * blocks of E * tiles * B.
    """
    blocks: tl.constexpr = (E + BE - 1) // BE
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    e0 = rest % blocks * BE
    rest = rest // blocks
    t = rest % tiles * BT + tl.arange(0, BT)
    image = (rest // tiles).to(tl.int64)
    inside = t < tokens
    q += (image * q_b + head * q_n) * UNIT
    matrix += (image * heads + head) * D * E
    mean += (image * heads + head) * D

    total = tl.zeros([BT], tl.float32)
    for d0 in tl.static_range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        features = load_tokens(q, t * q_t * UNIT, inside, D, BD, d0).to(tl.float32)
        total += tl.sum(features * tl.load(mean + d, mask=d < D, other=0.0)[None, :], 1)
    total = tl.where(inside, total + eps, 1.0)
    acc = tl.zeros([BT, BE], tl.float32)
    acc = rows_times(q, t * q_t * UNIT, inside, matrix, acc, e0, D, E, BD, BE, 0, PRECISION)
    store_tokens(out + image * tokens * heads * E, (t * heads + head) * E, inside, acc / total[:, None], E, BE, e0)
    if e0 == 0:
        tl.store(norm + image * tokens * heads + t * heads + head, total, mask=inside)


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_ONES)
def linear_dq(
    grad, out, norm, matrix, mean, dq, weight, fade, heads, tokens, tiles, g_b, g_t, g_n,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq `[B, L, N, D]`, weight = 1 / norm and fade = -(out . grad) / norm `[B, L, N]` (fp32), contiguous.

    grad: the gradient of out by its strides, counted in UNIT elements. Grid: heads * blocks of D * tiles * B.
    """
    blocks: tl.constexpr = (D + BD - 1) // BD
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    d0 = rest % blocks * BD
    rest = rest // blocks
    t = rest % tiles * BT + tl.arange(0, BT)
    image = (rest // tiles).to(tl.int64)
    inside = t < tokens
    grad += (image * g_b + head * g_n) * UNIT
    out += image * tokens * heads * E
    matrix += (image * heads + head) * D * E
    here = image * tokens * heads + t * heads + head

    acc = tl.zeros([BT, BD], tl.float32)
    less = tl.zeros([BT], tl.float32)
    for e0 in tl.static_range(0, E, BE):
        do = load_tokens(grad, t * g_t * UNIT, inside, E, BE, e0).to(tl.float32)
        o = load_tokens(out, (t * heads + head) * E, inside, E, BE, e0).to(tl.float32)
        less += tl.sum(do * o, 1)
        acc = tl.dot(do, load_matrix(matrix, e0, d0, E, D, BE, BD, 1), acc, input_precision=PRECISION)
    inverse = 1.0 / tl.load(norm + here, mask=inside, other=1.0)
    d = d0 + tl.arange(0, BD)
    m = tl.load(mean + (image * heads + head) * D + d, mask=d < D, other=0.0)
    acc = (acc - less[:, None] * m[None, :]) * inverse[:, None]
    store_tokens(dq + image * tokens * heads * D, (t * heads + head) * D, inside, acc, D, BD, d0)
    if d0 == 0:
        tl.store(weight + here, inverse, mask=inside)
        tl.store(fade + here, -less * inverse, mask=inside)
