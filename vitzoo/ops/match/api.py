"""match: for each token of one set the most similar one of another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops._validate import check_tensors
from vitzoo.ops.match import matmul, reference, triton


class MatchCall(NamedTuple):
    """A validated call: what implementations look at and run."""

    a: Tensor
    b: Tensor


def match(a: Tensor, b: Tensor, *, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """The largest inner product of each token of a set with those of another, and whose it is.

        best[i] = max_j a[i] . b[j]        index[i] = the first j where it is reached

    The matching of ToMe (Bolya et al. 2023, arXiv:2210.09461, section 3.2) on unit vectors: who could merge with whom.

    Args:
        a: `[B, A, D]`, any strides with D contiguous.
        b: `[B, S, D]` in the dtype of a, likewise; S at least 1.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        best `[B, A]` in the dtype of a, and index `[B, A]`, int64. Differentiable in a and b, through best. Half types
        accumulate in fp32, and are rounded to half before they are compared everywhere but in the kernel.

    Raises:
        ValueError: shapes, dtypes or devices disagree, b is empty, or the named implementation does not support the call
            (the message holds its reason).
    """
    best, index = OP.run(prepare(a, b), impl)
    return best, index


def prepare(a: Tensor, b: Tensor) -> MatchCall:
    """The validated call; raises ValueError with a sentence."""
    check_tensors("match", a=a, b=b, dims="[B, L, D]")
    if a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ValueError(f"match needs a [B, A, D] and b [B, S, D], got {list(a.shape)} and {list(b.shape)}.")
    if a.dtype != b.dtype:
        raise ValueError(f"match needs a and b of one dtype, got {a.dtype} and {b.dtype}.")
    return MatchCall(a, b)


OP = Op(
    "match",
    prepare,
    (
        Implementation("torch", matmul.supports, matmul.run),
        # behind torch, which takes every call, for the reason that attend2d gives
        Implementation("triton", triton.supports, triton.run),
        Implementation("reference", reference.supports, reference.run),
    ),
)
