"""merge_tokens and unmerge_tokens as copies of rows; computed are the few rows that somebody joins."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(call: object) -> str | None:
    """Takes every call."""
    return None


def merge(call) -> tuple[Tensor]:
    """(y,) of a `MergeCall`."""
    x, kept, moved, into, share = call
    y = rows(x, kept)
    towards = (rows(x, moved) - rows(y, into)) * share.to(x.dtype)[..., None]
    return (add_rows(y, into, towards),)


def unmerge(call) -> tuple[Tensor]:
    """(x,) of an `UnmergeCall`."""
    return (torch.where((call.source >= 0)[..., None], rows(call.y, call.source.clamp(min=0)), 0),)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """``x[b, index[b, i]]`` for tokens ``[B, N, ...]`` and ``[B, M]``: whole rows, copied as such (a CPU likes that)."""
    if _single(x):
        return x[0].index_select(0, index[0])[None]
    flat = x.reshape(-1, *x.shape[2:]).index_select(0, _flat(index, x.shape[1]))
    return flat.view(*index.shape, *x.shape[2:])


def add_rows(y: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """``y[b, index[b, i]] += x[b, i]``, repeated indices included; ``y`` is written and returned."""
    if _single(y):
        y[0].index_add_(0, index[0], x[0])
    else:
        y.view(-1, *y.shape[2:]).index_add_(0, _flat(index, y.shape[1]), x.reshape(-1, *x.shape[2:]))
    return y


def _single(x: Tensor) -> bool:
    """One image, in eager mode: its indices need no offsets, and each operation less counts in its latency."""
    return not torch.compiler.is_compiling() and x.shape[0] == 1


def _flat(index: Tensor, length: int) -> Tensor:
    """Indices into images of ``length`` tokens as indices into all of them, one after the other: ``[B * M]``."""
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * length).view(-1)
