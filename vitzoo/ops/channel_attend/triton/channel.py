"""What happens between channels, on matrices of `[D, E]`: a softmax of summed scores, and its gradient.

    channel_softmax    P = softmax over E of scale * the sum of the parts of q^T k
    channel_dscore     dS = scale * P * (dP - the sum over E of P dP), dP = the sum of the parts of dout^T v

A program holds BD whole rows. The passes over tokens are those of `vitzoo.ops._triton.products`, and so is what ROUND means.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vitzoo.ops._triton.products import nearest_tf32


@triton.jit
def _rows(D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BLOCK_E: tl.constexpr):
    """(first number of this program's matrix, numbers of its rows `[BD, BLOCK_E]`, which of them exist)."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    d, e = tl.program_id(0) % blocks * BD + tl.arange(0, BD), tl.arange(0, BLOCK_E)
    inside = (d < D)[:, None] & (e < E)[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64) * D * E, d[:, None] * E + e[None, :], inside


@triton.jit
def _summed(parts_of, at, inside, parts, numbers, BD: tl.constexpr, BLOCK_E: tl.constexpr):
    total = tl.zeros([BD, BLOCK_E], tl.float32)
    for _ in range(0, parts):
        total += tl.load(parts_of + at, mask=inside, other=0.0)
        parts_of += numbers
    return total


@triton.jit(do_not_specialize=["parts", "numbers"])
def channel_softmax(
    parts_of, weights, scale, parts, numbers,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BLOCK_E: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """weights `[B, N, D, E]` of parts `[parts, B, N, D, E]`, of `numbers` each; fp32. Grid: ceil(D / BD) * N * B."""
    first, at, inside = _rows(D, E, BD, BLOCK_E)
    scores = _summed(parts_of + first, at, inside, parts, numbers, BD, BLOCK_E) * scale
    scores = tl.where(inside, scores, -1.0e38)  # finite: a row that does not exist must not give inf - inf
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    if ROUND:
        p = nearest_tf32(p)
    tl.store(weights + first + at, p, mask=inside)


@triton.jit(do_not_specialize=["parts", "numbers"])
def channel_dscore(
    parts_of, weights, dscore, scale, parts, numbers,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BLOCK_E: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """dscore `[B, N, D, E]`, the gradient of q^T k; arguments as above."""
    first, at, inside = _rows(D, E, BD, BLOCK_E)
    p = tl.load(weights + first + at, mask=inside, other=0.0)
    dp = _summed(parts_of + first, at, inside, parts, numbers, BD, BLOCK_E)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale
    if ROUND:
        ds = nearest_tf32(ds)
    tl.store(dscore + first + at, ds, mask=inside)
