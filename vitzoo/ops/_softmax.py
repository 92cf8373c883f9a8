"""The two normalisations that implementations share, and the layout that exported graphs need."""

from __future__ import annotations

import torch
from torch import Tensor


def safe_logsumexp(scores: Tensor) -> Tensor:
    """logsumexp over the last dimension: -inf, with a zero gradient, where there is no key or every key is masked."""
    if isinstance(scores.shape[-1], int) and scores.shape[-1] == 0:  # type: ignore[redundant-expr]  # or a SymInt
        return scores.sum(-1) - torch.inf
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return torch.logsumexp(scores.masked_fill(empty, 0.0), -1).masked_fill(empty.squeeze(-1), -torch.inf)


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), zero where lse is -inf."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])


def settled(out: Tensor) -> Tensor:
    """``out`` in a memory layout of its own where a graph is exported: a view behind PyTorch's fused attention holds for the
    strides that it happens to return, and ONNX writes the products out, which return others.
    """
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler.is_exporting() else out
