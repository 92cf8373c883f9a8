"""dTPS: joint token pruning and squeezing. Wei et al. 2023, arXiv:2304.10716.

DynamicViT's choice of patches, but what is pruned is not lost: each pruned patch goes into the kept one that it is most
similar to, weighted by the exponential of their cosine; the kept one itself has weight e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitzoo.ops import match
from vitzoo.tokens._map import TokenMap, add_rows, complement, protect, rows
from vitzoo.tokens._method import register
from vitzoo.tokens._state import State
from vitzoo.tokens.dynamicvit import DynamicViT


def directions(x: Tensor) -> Tensor:
    """``x / (norm + 1e-6)`` along the channels."""
    return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


def squeeze(kept: Tensor, pruned: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Bring each pruned token into its most similar kept one.

    With c the cosine over the temperature: kept_j = (e kept_j + sum_i exp(c_ij) pruned_i) / (e + sum_i exp(c_ij)), over the
    pruned tokens i whose most similar kept token is j.

    Args:
        kept: ``[B, K, C]``.
        pruned: ``[B, R, C]``.
        temperature: of the cosines.

    Returns:
        ``[B, K, C]``, differentiable in both through similarities too, and the host ``[B, R]`` of each pruned token.
    """
    best, host = match(directions(pruned), directions(kept))
    weight = (best / temperature).exp()
    total = add_rows(torch.full_like(kept[..., 0], math.e), host, weight)
    moving = pruned * (weight / rows(total, host))[..., None]
    return add_rows(kept * (math.e / total)[..., None], host, moving), host


def squeeze_masked(x: Tensor, keep: Tensor, before: Tensor, temperature: float = 1.0) -> Tensor:
    """``squeeze`` in training, where all tokens stay: those dropped just now go, by weight, into kept ones as well.

    Args:
        x: ``[B, N, C]``.
        keep: ``[B, N]``: 1 for what is still kept.
        before: ``[B, N]``: 1 for what was kept until now.
        temperature: of the cosines.

    Returns:
        ``[B, N, C]``. Differentiable in x, and in the decisions.
    """
    d = directions(x)
    cosine = d @ d.transpose(1, 2) / temperature
    never = torch.eye(x.shape[1], dtype=torch.bool, device=x.device) | (keep[:, None, :] < 0.5)
    cosine = cosine.masked_fill(never, -100.0)
    host = cosine >= cosine.amax(dim=-1, keepdim=True)
    weight = cosine.exp() * host * (before * (1 - keep))[..., None]
    total = math.e + weight.sum(dim=1)
    return x * (math.e / total)[..., None] + (weight / total[:, None, :]).transpose(1, 2) @ x


@register("tps")
@dataclass(eq=False)
class TPS(DynamicViT):
    """Prune by a predictor and squeeze what is pruned into what stays.

    Attributes:
        temperature: of the cosines.
    """

    keep_rate: float | Sequence[float] = 0.7
    temperature: float = 1.0

    def prune(self, state: State, kept: Tensor) -> State:
        patches, prefix = state.x[:, self.prefix :], self.prefix
        gone = complement(kept, patches.shape[1])
        stay, host = squeeze(rows(patches, kept), rows(patches, gone), self.temperature)
        x = torch.cat([state.x[:, :prefix], stay], dim=1)
        step = TokenMap(protect(kept, prefix), gone + prefix, host + prefix, state.x.shape[1])
        return state.advance(step, x, follow=self.follow)

    def mask(self, state: State, now: Tensor, before: Tensor) -> State:
        patches = squeeze_masked(state.x[:, self.prefix :], now, before, self.temperature)
        return state._replace(x=torch.cat([state.x[:, : self.prefix], patches], dim=1))
