"""The best partner of each token: tiles of tokens over tiles of partners, with a running maximum and where it was."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["A", "S", "tiles", "a_b", "a_t", "b_b", "b_t"])
def best_partner(
    a, b, best, index, A, S, tiles, a_b, a_t, b_b, b_t,
    D: tl.constexpr, BA: tl.constexpr, BS: tl.constexpr, BLOCK_D: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """best and index `[B, A]`, contiguous, of a `[B, A, D]` and b `[B, S, D]`. Grid: tiles of BA tokens * B."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BA + tl.arange(0, BA)
    a += image * a_b * UNIT
    b += image * b_b * UNIT
    top = tl.full([BA], float("-inf"), tl.float32)
    at = tl.zeros([BA], tl.int32)
    for first in range(0, S, BS):
        cols = first + tl.arange(0, BS)
        products = tl.zeros([BA, BS], tl.float32)
        for channel in range(0, D, BLOCK_D):
            d = channel + tl.arange(0, BLOCK_D)
            x = tl.load(a + rows[:, None] * a_t * UNIT + d[None, :], mask=(rows < A)[:, None] & (d < D)[None, :], other=0.0)
            y = tl.load(b + cols[None, :] * b_t * UNIT + d[:, None], mask=(cols < S)[None, :] & (d < D)[:, None], other=0.0)
            products += tl.dot(x, y, input_precision=PRECISION)
        products = tl.where((cols < S)[None, :], products, float("-inf"))
        value, place = tl.max(products, 1, return_indices=True, return_indices_tie_break_left=True)
        at = tl.where(value > top, first + place, at)  # of equals the first, across tiles too
        top = tl.maximum(top, value)
    where = image * A + rows
    tl.store(best + where, top.to(best.dtype.element_ty), mask=rows < A)
    tl.store(index + where, at.to(tl.int64), mask=rows < A)
