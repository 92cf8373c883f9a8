"""merge_tokens and unmerge_tokens: fewer tokens by weighted means, and a value for every old one again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops.merge_tokens import reference, rows, triton


class MergeCall(NamedTuple):
    """A validated call of merge_tokens: what implementations look at and run."""

    x: Tensor
    kept: Tensor
    moved: Tensor
    into: Tensor
    share: Tensor


class UnmergeCall(NamedTuple):
    """A validated call of unmerge_tokens: what implementations look at and run."""

    y: Tensor
    source: Tensor


def merge_tokens(x: Tensor, kept: Tensor, moved: Tensor, into: Tensor, share: Tensor, *, impl: str | None = None) -> Tensor:
    """Tokens that stay go towards those that join them.

        y[k] = x[kept[k]] + sum_{i: into[i] = k} share[i] (x[moved[i]] - x[kept[k]])

    With share = size of the moved token over the size of the new one it is ToMe's weighted mean (Bolya et al. 2023,
    arXiv:2210.09461, section 3.2).

    Args:
        x: `[B, N, C]`.
        kept: `[B, K]`, int64: the old token at each new place; no token twice.
        moved: `[B, R]`, int64: tokens that join another; none that is kept.
        into: `[B, R]`, int64: the new place that each joins.
        share: `[B, R]`: how much of the new token each is, in the dtype of x or fp32.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        `[B, K, C]` in the dtype of x. Tokens that are neither kept nor moved leave no trace. One that nothing joins keeps
        its bits. Differentiable in x, and in share except by the kernels.

    Raises:
        ValueError: shapes disagree, indices are not int64, or the named implementation does not support the call (the
            message holds its reason).
    """
    (y,) = MERGE.run(prepare_merge(x, kept, moved, into, share), impl)
    return y


def unmerge_tokens(y: Tensor, source: Tensor, *, impl: str | None = None) -> Tensor:
    """Every old token gets the value of what stands for it; zeros where nothing does.

    Args:
        y: `[B, K, C]`.
        source: `[B, N]`, int64: which of the K stands for each old token, -1 for none.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        `[B, N, C]` in the dtype of y. Differentiable in y.

    Raises:
        ValueError: shapes disagree, source is not int64, or the named implementation does not support the call (the
            message holds its reason).
    """
    (x,) = UNMERGE.run(prepare_unmerge(y, source), impl)
    return x


def prepare_merge(x: Tensor, kept: Tensor, moved: Tensor, into: Tensor, share: Tensor) -> MergeCall:
    """The validated call; raises ValueError with a sentence."""
    if x.ndim != 3 or kept.ndim != 2 or kept.shape[0] != x.shape[0] or not moved.shape == into.shape == share.shape:
        raise ValueError(
            "merge_tokens needs x [B, N, C], kept [B, K] and moved, into, share [B, R], "
            f"got {list(x.shape)}, {list(kept.shape)}, {list(moved.shape)}, {list(into.shape)}, {list(share.shape)}."
        )
    _check_index("merge_tokens", kept=kept, moved=moved, into=into)
    return MergeCall(x, kept, moved, into, share)


def prepare_unmerge(y: Tensor, source: Tensor) -> UnmergeCall:
    """The validated call; raises ValueError with a sentence."""
    if y.ndim != 3 or source.ndim != 2 or source.shape[0] != y.shape[0]:
        raise ValueError(f"unmerge_tokens needs y [B, K, C] and source [B, N], got {list(y.shape)} and {list(source.shape)}.")
    _check_index("unmerge_tokens", source=source)
    return UnmergeCall(y, source)


def _check_index(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int64:
            raise ValueError(f"{op} needs {name} in int64, got {tensor.dtype}.")


MERGE = Op(
    "merge_tokens",
    prepare_merge,
    (
        Implementation("torch", rows.supports, rows.merge),
        # behind torch, which takes every call, for the reason that attend2d gives
        Implementation("triton", triton.supports_merge, triton.run_merge),
        Implementation("reference", reference.supports, reference.merge),
    ),
)
UNMERGE = Op(
    "unmerge_tokens",
    prepare_unmerge,
    (
        Implementation("torch", rows.supports, rows.unmerge),
        Implementation("triton", triton.supports_unmerge, triton.run_unmerge),
        Implementation("reference", reference.supports, reference.unmerge),
    ),
)
