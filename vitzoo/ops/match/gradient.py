"""The gradient of match, for whatever computed its values: that of the product of a token with its partner."""

from __future__ import annotations

import torch
from torch import Tensor


def backward(dbest: Tensor, a: Tensor, b: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """da and db: each pair gives the other's token."""
    at = index[..., None].expand(-1, -1, a.shape[2])
    return dbest[..., None] * b.gather(1, at), torch.zeros_like(b).scatter_add(1, at, dbest[..., None] * a)
