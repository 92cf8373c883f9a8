"""DynamicViT: dynamic token sparsification. Rao et al. 2021, arXiv:2106.02034.

In front of a few blocks a small network says of every patch how likely it is to be kept. In evaluation the best stay, a
fixed share of all patches; in training nobody leaves: a sampled decision masks the others as keys, a loss holds the share of
kept ones where it should be, and the dense model teaches.

Deviations: any number of patches (the published code has 14 x 14 written in); the softmax with a policy is used in training
only where something is reduced; all prefix tokens are protected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.tokens._map import keep_only, protect, rows
from vitzoo.tokens._method import Method, Step, log_size, register
from vitzoo.tokens._parts import QKV, softmax_attend
from vitzoo.tokens._policy import (
    ScorePredictor,
    Teacher,
    gumbel,
    logit_distillation,
    policy_attend,
    ratio_loss,
    sampled_decision,
    token_distillation,
)
from vitzoo.tokens._schedule import check_layers, check_rate, pruning_layers
from vitzoo.tokens._state import State


@register("dynamicvit")
@dataclass(eq=False)
class DynamicViT(Method):
    """Keep the patches that a learned predictor chooses.

    Attributes:
        keep_rate: share of all patches that is left after the first stage, its square after the second and so on; or a list
            of shares of all patches, one for each of ``layers``.
        layers: blocks in front of which patches go; None: 3, 6, 9 of 12.
        distill: learn from a copy of the model as it is now.
        ratio_weight: of the loss on the share of kept patches (published: 2; DeiT-B: 5).
        distill_weight: of the losses to the teacher's logits and patches.
        squares: compare patches by mean squares (DeiT) or as distributions (LV-ViT).
    """

    keep_rate: float | Sequence[float] = 0.7
    layers: Sequence[int] | None = None
    distill: bool = True
    ratio_weight: float = 2.0
    distill_weight: float = 0.5
    squares: bool = True

    noise = staticmethod(gumbel)

    def attach(self, model: Any) -> None:
        layers = pruning_layers(self.depth) if self.layers is None else check_layers(self.layers, self.depth)
        rates = (
            [self.keep_rate ** (k + 1) for k in range(len(layers))]
            if isinstance(self.keep_rate, int | float)
            else list(self.keep_rate)
        )
        if len(rates) != len(layers):
            raise ValueError(f"keep_rate lists {len(rates)} shares for {len(layers)} layers. Give one for each.")
        self.rates = {layer: check_rate(rate) for layer, rate in zip(layers, rates, strict=True)}
        self.active = any(rate < 1 for rate in self.rates.values())
        self.teacher = Teacher(model) if self.distill and self.active else None
        like = next(model.blocks.parameters())
        predictors = nn.ModuleList(ScorePredictor(model.embed_dim) for _ in layers)
        model.score_predictor = predictors.to(like.device, like.dtype)
        self.predictors = dict(zip(layers, predictors, strict=True))

    def detach(self, model: Any) -> None:
        del model.score_predictor

    def trains(self, step: Step) -> bool:
        """Whether decisions are sampled and masked instead of carried out."""
        return self.active and bool(step.parts.block.training)

    def before(self, step: Step, state: State) -> State:
        if not self.active or step.layer not in self.rates:
            return state
        patches = state.x[:, self.prefix :]
        if not self.trains(step):
            count = int(state.patches * self.rates[step.layer])
            if count >= patches.shape[1]:
                return state
            keep = self.predictors[step.layer](patches)[..., 0]
            return self.prune(state, keep.topk(max(count, 1), dim=1).indices)
        policy = state.policy if state.policy is not None else patches.new_ones(state.x.shape[:2])
        alive = policy[:, self.prefix :]
        log_probability = self.predictors[step.layer](patches, alive)
        now = sampled_decision(log_probability, self.noise(log_probability)) * alive
        state = self.mask(state, now, alive)
        policy = torch.cat([torch.ones_like(policy[:, : self.prefix]), now], dim=1)
        return state._replace(policy=policy, extra=(*state.extra, now))

    def prune(self, state: State, kept: Tensor) -> State:
        """In evaluation: the patches at ``kept`` ``[B, M]`` stay, in that order."""
        index = protect(kept, self.prefix)
        step = keep_only(index, state.x.shape[1])
        return state.advance(step, rows(state.x, index), follow=self.follow)

    def mask(self, state: State, now: Tensor, before: Tensor) -> State:
        """In training: what becomes of the tokens when a decision ``now`` follows that of ``before``; here nothing."""
        return state

    def divides(self, step: Step, state: State) -> bool:
        return self.trains(step)

    def attend(self, step: Step, state: State, qkv: QKV) -> Tensor:
        if not self.trains(step):
            return softmax_attend(qkv, log_size(state))
        policy = state.x.new_ones(state.x.shape[:2]) if state.policy is None else state.policy
        return policy_attend(qkv, policy)

    def finish(self, state: State) -> Tensor:
        if state.extra:
            self.noted = {"decisions": state.extra, "tokens": state.x}
        return state.x

    def loss(self, model: Any, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """The share of kept patches, and the teacher."""
        if not self.noted:
            return None
        decisions, x = self.noted.pop("decisions"), self.noted.pop("tokens")
        total = self.ratio_weight * ratio_loss(decisions, list(self.rates.values()))
        if self.teacher is not None:
            features, taught = self.teacher(images)
            ours, theirs = model.norm(x)[:, self.prefix :], features[:, self.prefix :]
            total = total + self.distill_weight * logit_distillation(logits, taught)
            total = total + self.distill_weight * token_distillation(ours, theirs, decisions[-1].detach(), self.squares)
        return total
