"""TAP and ADL: robustifying token attention. Guo et al. 2023, arXiv:2303.11126.

In front of every attention each patch chooses how wide a neighbourhood it is averaged over: a small convolutional network
weighs the patch itself against 3x3 means of rising dilation. No token leaves. The diversification loss drives the attention of
different patches apart.

Deviations: any grid (published: squares); prefix tokens are not pooled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitzoo.layers.tap import DilationPredictor, diversification, pool_tokens
from vitzoo.tokens._method import Method, Step, register
from vitzoo.tokens._parts import QKV
from vitzoo.tokens._schedule import check_layers
from vitzoo.tokens._state import State


@register("tap")
@dataclass(eq=False)
class TAP(Method):
    """Pool tokens in front of attention.

    Attributes:
        scales: neighbourhoods to choose from; 1: none.
        layers: blocks that pool; None: all.
        diversify: weight of the diversification loss (published: 1). It needs all attention scores in training.
    """

    scales: int = 4
    layers: Sequence[int] | None = None
    diversify: float = 0.0

    def attach(self, model: Any) -> None:
        layers = range(self.depth) if self.layers is None else self.layers
        self.where = frozenset(check_layers(layers, self.depth)) if self.scales > 1 else frozenset()
        self.watch_grid(model)
        like = next(model.blocks.parameters())
        for i in self.where:
            model.blocks[i].dilation_predictor = DilationPredictor(model.embed_dim, self.scales).to(like.device, like.dtype)

    def detach(self, model: Any) -> None:
        self.handle.remove()
        for i in self.where:
            del model.blocks[i].dilation_predictor

    def divides(self, step: Step, state: State) -> bool:
        return step.layer in self.where

    def read(self, step: Step, x: Tensor) -> Tensor:
        height, width = self.grid or (0, 0)
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        grid = patches.transpose(1, 2).unflatten(2, (height, width))
        pooled = pool_tokens(grid, step.parts.block.dilation_predictor(grid))
        return step.parts.read(torch.cat([prefix, pooled.flatten(2).transpose(1, 2)], dim=1))

    def between(self, step: Step, state: State, qkv: QKV) -> State:
        if not (self.diversify and step.parts.block.training):
            return state
        scores = (qkv.q.transpose(1, 2) * qkv.scale) @ qkv.k.permute(0, 2, 3, 1)
        return state._replace(extra=(*state.extra, diversification(scores.softmax(dim=-1))))

    def finish(self, state: State) -> Tensor:
        self.noted = {"diversification": state.extra} if state.extra else {}
        return state.x

    def loss(self, model: Any, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """The diversification loss, where it has a weight."""
        terms = self.noted.pop("diversification", ())
        return self.diversify * torch.stack(terms).sum() / (len(terms) + 1e-6) if terms else None
