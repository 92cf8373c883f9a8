"""Neighborhood attention on a map of any size: a kernel that shrinks to it, a dilation that grows with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.ops import attend2d
from vitzoo.patterns import Pattern, Span

__all__ = ["attend_near"]


def attend_near(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, size: int, spread: bool = False) -> Tensor:
    """Attention of every token to the ``size`` x ``size`` nearest, or to as many spread over the map.

    An axis shorter than ``size`` is seen as a whole. ``spread`` takes tokens n // size apart on an axis of n tokens, at least
    1 and at most ``size``: two layers, one of either kind, reach over a map of ``size`` squared.

    Args:
        q: ``[B, H, W, N, D]``.
        k: likewise.
        v: likewise.
        bias: ``[N, 2 size - 1, 2 size - 1]``, by the distance from query to key in steps of the dilation.
        size: tokens on a side of the neighborhood.
        spread: dilate it.

    Returns:
        ``[B, H, W, N, D]``. A graph computes it by gathering keys, for all sizes of the map alike.
    """
    height, width = q.shape[1], q.shape[2]
    if torch.compiler.is_compiling():
        return _gathered(q, k, v, bias, _keys(height, size, spread, q), _keys(width, size, spread, q))
    spans = [Span(min(size, n), _dilation(n, size, spread), 1, edge="clamp") for n in (height, width)]
    rows, cols = (size - min(size, n) for n in (height, width))  # distances that a short axis does not have
    table = bias[:, rows : bias.shape[1] - rows, cols : bias.shape[2] - cols]
    return attend2d(q, k, v, Pattern(*spans), bias=table)


def _dilation(n: int, size: int, spread: bool) -> int:
    return max(1, min(n // size, size)) if spread else 1


def _keys(n: int, size: int, spread: bool, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each of n coordinates: its keys, their entries in the table, whether they exist; each ``[n, size]``."""
    step: Any = torch.sym_max(1, torch.sym_min(n // size, size)) if spread else 1
    at = torch.arange(n, device=like.device)
    position = at // step
    residue = at - position * step
    length = (n - 1 - residue) // step + 1
    start = torch.minimum((position - size // 2).clamp(min=0), (length - size).clamp(min=0))
    keys = start[:, None] + torch.arange(size, device=like.device)
    exists = keys < length[:, None]
    entry = keys - position[:, None] + size - 1
    return torch.where(exists, keys * step + residue[:, None], 0), torch.where(exists, entry, 0), exists


def _gathered(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, rows: Any, cols: Any) -> Tensor:
    (key_y, entry_y, exists_y), (key_x, entry_x, exists_x) = rows, cols
    y, x = key_y[:, None, :, None], key_x[None, :, None, :]
    keys, values = k[:, y, x].flatten(3, 4), v[:, y, x].flatten(3, 4)  # [B, H, W, size * size, N, D]
    # products and sums, no einsum: its reshapes ask whether sizes divide
    scores = ((q * q.shape[-1] ** -0.5)[:, :, :, None] * keys).sum(-1)
    table = bias[:, entry_y[:, None, :, None], entry_x[None, :, None, :]].flatten(3).permute(1, 2, 3, 0)
    exists = (exists_y[:, None, :, None] & exists_x[None, :, None, :]).flatten(2)
    weights = (scores + table).masked_fill(~exists[..., None], float("-inf")).softmax(dim=3)
    return (weights.to(v.dtype)[..., None] * values).sum(3)
