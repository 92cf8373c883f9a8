"""Rows of tokens brought together, and handed out again.

    collect    y[k] = sum_{n: source[n] = k} weight[n] x[n]
    spread     x[n] = weight[n] y[source[n]], zeros where source[n] is -1

A program writes BT tokens of BC channels. `order` holds the n of each k one after the other, from `first[k]` on.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTEGERS = ["N", "K", "x_b", "x_t", "y_b", "y_t", "tiles"]


@triton.jit
def _where(tiles, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """(tokens, channels, image) of this program."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    rest = tl.program_id(0) // blocks
    channels = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    return rest % tiles * BT + tl.arange(0, BT), channels, (rest // tiles).to(tl.int64)


@triton.jit(do_not_specialize=[name for name in _INTEGERS if name not in ("y_b", "y_t")])
def collect(
    x, order, first, weight, y, N, K, x_b, x_t, tiles, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """y `[B, K, C]`, contiguous. Grid: tiles of tokens * blocks of channels * B."""
    tokens, channels, image = _where(tiles, C, BT, BC)
    x += image * x_b
    order += image * N
    weight += image * N
    first += image * (K + 1)
    begin = tl.load(first + tokens, mask=tokens < K, other=0)
    end = tl.load(first + tokens + 1, mask=tokens < K, other=0)
    total = tl.zeros([BT, BC], tl.float32)
    for i in range(0, tl.max(end - begin, 0)):
        here = begin + i < end
        n = tl.load(order + begin + i, mask=here, other=0)
        share = tl.load(weight + n, mask=here, other=0.0)
        row = tl.load(x + n[:, None] * x_t + channels[None, :], mask=here[:, None] & (channels < C)[None, :], other=0.0)
        total += share[:, None] * row.to(tl.float32)
    at = image * K * C + tokens[:, None] * C + channels[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(tokens < K)[:, None] & (channels < C)[None, :])


@triton.jit(do_not_specialize=[name for name in _INTEGERS if name not in ("K", "x_b", "x_t")])
def spread(y, source, weight, x, N, y_b, y_t, tiles, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """x `[B, N, C]`, contiguous. Grid: tiles of tokens * blocks of channels * B."""
    tokens, channels, image = _where(tiles, C, BT, BC)
    k = tl.load(source + image * N + tokens, mask=tokens < N, other=-1)
    share = tl.load(weight + image * N + tokens, mask=tokens < N, other=0.0)
    at = y + image * y_b + k[:, None] * y_t + channels[None, :]
    row = tl.load(at, mask=(k >= 0)[:, None] & (channels < C)[None, :], other=0.0).to(tl.float32) * share[:, None]
    at = image * N * C + tokens[:, None] * C + channels[None, :]
    tl.store(x + at, row.to(x.dtype.element_ty), mask=(tokens < N)[:, None] & (channels < C)[None, :])
