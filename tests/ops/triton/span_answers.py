"""The span rule as the kernels evaluate it, written out for all positions of an axis."""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops.attend2d.triton import _spans


@triton.jit
def answers(result, length, size, stride, shift, CLAMP: tl.constexpr):
    """result `[3, 64]`: start, first and end of the positions 0..63."""
    m = tl.arange(0, 64)
    span = (size, stride, shift)
    first, end = _spans.query_bounds(m, m + 1, span, length, CLAMP)
    tl.store(result + m, _spans.run_start(m, span, length, CLAMP))
    tl.store(result + 64 + m, first)
    tl.store(result + 128 + m, end)
