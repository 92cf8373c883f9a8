"""Rows of channels in and out of registers: one way for all kernels."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tokens(base, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr, first=0):
    """Rows `base + offsets` of D numbers as `[rows, BLOCK_D]`, from channel `first` on; zero where none exists.

    Where BLOCK_D divides D, `first` must be such that whole blocks exist.
    """
    d = first + tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (d < D)[None, :]
    return tl.load(base + (offsets[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit
def store_tokens(base, offsets, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr, first=0):
    """The reverse of `load_tokens`."""
    d = first + tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if D % BLOCK_D != 0:
        mask = mask & (d < D)[None, :]
    tl.store(base + (offsets[:, None] + d[None, :]), value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def finite(lse):
    """lse in powers of two, 0 for a query that sees nothing: its scores are all -inf, and so its weights are 0."""
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)
