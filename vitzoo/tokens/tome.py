"""ToMe: token merging. Bolya et al. 2023, arXiv:2210.09461.

In every block, between attention and MLP, r tokens go into their most similar partner: tokens are dealt into two sets in
turn (even and odd places), each of the first set has one favourite in the second, and the r most similar pairs merge into
the mean of all patches in them. Keys say what is similar. No parameters.

Deviations: all prefix tokens are protected; layer scale and query-key norm take part; a key of zeros is similar to nothing
instead of not-a-number; the order after a merge with a distillation token is what the sources say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitzoo.ops import match
from vitzoo.tokens._map import TokenMap
from vitzoo.tokens._method import Method, Step, log_size, register
from vitzoo.tokens._parts import QKV, softmax_attend
from vitzoo.tokens._schedule import merge_schedule
from vitzoo.tokens._state import State


@torch.no_grad()
def bipartite_matching(metric: Tensor, r: int, prefix: int = 1) -> TokenMap | None:
    """Pair tokens at even places with those at odd ones; the r most similar pairs merge.

    Args:
        metric: ``[B, N, D]``: what is compared, by its direction.
        r: tokens to merge away; at most half of those that are no prefix.
        prefix: tokens in front that neither merge nor are merged into. With any, the others keep the order of their
            places (the first set, then the second); without, the first set comes by falling similarity.

    Returns:
        The map, or None where nothing merges.
    """
    length = metric.shape[1]
    r = min(r, (length - prefix) // 2)
    if r <= 0:
        return None
    m = metric / metric.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(metric.dtype).tiny)
    first, second = prefix + prefix % 2, prefix + 1 - prefix % 2  # the first tokens of both sets that may merge
    best, host = match(m[:, first::2], m[:, second::2])
    order = best.argsort(dim=-1, descending=True)
    places = torch.arange(length, device=metric.device).expand(metric.shape[0], -1)
    ranked = places[:, first::2].gather(1, order)
    stay = ranked[:, r:].sort(dim=-1).values if prefix else ranked[:, r:]
    into = host.gather(1, order[:, :r]) + (prefix + stay.shape[1])
    kept = torch.cat([places[:, :prefix], stay, places[:, second::2]], dim=1)
    return TokenMap(kept, ranked[:, :r], into, length)


@torch.no_grad()
def kth_matching(metric: Tensor, k: int) -> TokenMap | None:
    """Every k-th token takes in those of the k - 1 others that are most like it; a remainder of N % k is dropped.

    Args:
        metric: ``[B, N, D]``.
        k: 1 or less: nothing merges.

    Returns:
        The map to N // k tokens.
    """
    if k <= 1:
        return None
    batch, length, _ = metric.shape
    places = torch.arange(length // k * k, device=metric.device)
    last = places % k == k - 1
    return _into_best(metric, places[~last].expand(batch, -1), places[last].expand(batch, -1))


@torch.no_grad()
def random_matching(metric: Tensor, r: int, noise: Tensor | None = None) -> TokenMap | None:
    """r tokens drawn at random go into the most similar of the others, which follow in the order they were drawn.

    Args:
        metric: ``[B, N, D]``.
        r: tokens to merge away.
        noise: ``[B, N]``: the r smallest move; uniform unless given.

    Returns:
        The map, or None where nothing merges.
    """
    r = min(r, metric.shape[1] - 1)
    if r <= 0:
        return None
    order = (torch.rand(metric.shape[:2], device=metric.device) if noise is None else noise).argsort(dim=1)
    return _into_best(metric, order[:, :r], order[:, r:])


def _into_best(metric: Tensor, moved: Tensor, kept: Tensor) -> TokenMap:
    m = metric / metric.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(metric.dtype).tiny)
    a, b = (torch.take_along_dim(m, index[..., None], dim=1) for index in (moved, kept))
    return TokenMap(kept, moved, match(a, b)[1], metric.shape[1])


@register("tome")
@dataclass(eq=False)
class ToMe(Method):
    """Merge r tokens in every block.

    Attributes:
        r: see ``merge_schedule``.
        inflection: likewise.
        prop_attn: proportional attention: a token of n patches counts n times as a key. Off for MAE weights that were not
            trained with ToMe.
    """

    r: int | Sequence[float] = 8
    inflection: float = 0.0
    prop_attn: bool = True

    def attach(self, model: object) -> None:
        self.schedule = merge_schedule(self.depth, self.r, self.inflection)

    def divides(self, step: Step, state: State) -> bool:
        return self.schedule[step.layer] > 0 or (self.prop_attn and state.size is not None)

    def attend(self, step: Step, state: State, qkv: QKV) -> Tensor:
        return softmax_attend(qkv, log_size(state) if self.prop_attn else None)

    def between(self, step: Step, state: State, qkv: QKV) -> State:
        tokens = bipartite_matching(qkv.k.mean(dim=2), self.schedule[step.layer], self.prefix)
        if tokens is None:
            return state
        x, size = tokens.average(state.x, state.size)
        return state.advance(tokens, x, follow=self.follow, size=size)
