"""merge_tokens and unmerge_tokens as matrices of who goes where."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def supports(call: object) -> str | None:
    """The reference takes every call."""
    return None


def merge(call) -> tuple[Tensor]:
    """(y,) of a `MergeCall`."""
    wide = torch.promote_types(call.x.dtype, torch.float32)
    N, K = call.x.shape[1], call.kept.shape[1]
    stays, moves = (F.one_hot(index, N).to(wide) for index in (call.kept, call.moved))  # [B, K, N], [B, R, N]
    joins = F.one_hot(call.into, max(K, 1)).to(wide)[..., :K].transpose(1, 2) * call.share.to(wide)[:, None]  # [B, K, R]
    matrix = (1 - joins.sum(-1, keepdim=True)) * stays + joins @ moves
    return ((matrix @ call.x.to(wide)).to(call.x.dtype),)


def unmerge(call) -> tuple[Tensor]:
    """(x,) of an `UnmergeCall`."""
    matrix = call.source[..., None] == torch.arange(call.y.shape[1], device=call.y.device)  # [B, N, K]
    return (matrix.to(call.y.dtype) @ call.y,)
