"""EViT: expediting vision transformers by token reorganisation. Liang et al. 2022, arXiv:2202.07800.

In a few blocks, between attention and MLP, patches are ranked by what the class token attends to. The best stay, in that
order; the others are summed into one more token, weighted by that attention, or dropped. No parameters.

Deviations: all prefix tokens are protected (the published distilled models rank theirs among the patches).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitzoo.tokens._map import keep_only, protect, rows
from vitzoo.tokens._method import Method, Step, log_size, register
from vitzoo.tokens._parts import QKV, NotReducibleError, attend_with_lse, class_attention
from vitzoo.tokens._schedule import KeepRate, check_layers, check_rate, pruning_layers
from vitzoo.tokens._state import State


def attentive_tokens(scores: Tensor, count: int) -> Tensor:
    """The ``count`` highest scores of each image ``[B, N]``, the highest first: indices ``[B, count]``."""
    return scores.topk(count, dim=1).indices


def fuse_inattentive(x: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
    """The other patches ``[B, N, C]`` summed with their raw scores ``[B, N]`` as weights: ``[B, 1, C]``.

    Differentiable in x and the scores.
    """
    return scores.scatter(1, kept, 0.0).to(x.dtype)[:, None, :] @ x


@register("evit")
@dataclass(eq=False)
class EViT(Method):
    """Keep a share of the patches in some blocks.

    Attributes:
        keep_rate: share that stays at each of ``layers``; or a list with one for every block.
        layers: blocks that reduce; None: a quarter, half and three quarters of the way (3, 6, 9 of 12).
        fuse: sum the others into one token.
        tokens: keep this many patches at each layer instead of a share.
        shrink_start_epoch: in training, the epoch in which the rate begins to fall from 1 (the published 10).
        shrink_epochs: epochs that it takes to fall (the published 100); 0: no schedule.
    """

    NEEDS_CLASS: ClassVar[bool] = True

    keep_rate: float | Sequence[float] = 0.7
    layers: Sequence[int] | None = None
    fuse: bool = True
    tokens: int | None = None
    shrink_start_epoch: float = 0.0
    shrink_epochs: float = 0.0

    def attach(self, model: object) -> None:
        if isinstance(self.keep_rate, int | float):
            layers = pruning_layers(self.depth) if self.layers is None else check_layers(self.layers, self.depth)
            self.rates = {layer: check_rate(self.keep_rate) for layer in layers}
        else:
            if len(self.keep_rate) != self.depth:
                raise NotReducibleError(f"keep_rate lists {len(self.keep_rate)} rates and the model has {self.depth} blocks")
            self.rates = {i: check_rate(rate) for i, rate in enumerate(self.keep_rate)}

    def kept(self, step: Step, patches: int) -> int:
        """How many of so many patches stay at a block."""
        rate = self.rates.get(step.layer, 1.0)
        if self.tokens is not None and step.layer in self.rates:
            return min(self.tokens, patches)
        if self.epoch is not None and step.parts.block.training and rate < 1:
            rate = KeepRate(rate, self.shrink_start_epoch, self.shrink_epochs).at(self.epoch)
        return math.ceil(rate * patches)

    def divides(self, step: Step, state: State) -> bool:
        patches = state.x.shape[1] - self.prefix
        return step.layer in self.rates and self.kept(step, patches) < patches

    def weigh(self, step: Step, state: State, qkv: QKV) -> tuple[Tensor, QKV]:
        return attend_with_lse(qkv, log_size(state))

    def between(self, step: Step, state: State, qkv: QKV) -> State:
        x, prefix = state.x, self.prefix
        scores = class_attention(qkv, log_size(state)).mean(dim=1)[:, prefix:]
        kept = attentive_tokens(scores, self.kept(step, x.shape[1] - prefix))
        index = protect(kept, prefix)
        y = rows(x, index)
        if self.fuse:
            y = torch.cat([y, fuse_inattentive(x[:, prefix:], scores, kept)], dim=1)
        return state.advance(keep_only(index, x.shape[1], made=int(self.fuse)), y, follow=self.follow)
