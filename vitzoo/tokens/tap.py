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
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.tokens._parts import QKV
from vitzoo.tokens._schedule import check_layers
from vitzoo.tokens._wrap import Method, State, Step, register


class DilationPredictor(nn.Module):
    """How much of each neighbourhood every place takes: ``[B, C, H, W]`` to ``[B, scales, H, W]``, which sum to 1.

    Args:
        dim: channels C.
        scales: neighbourhoods, the place itself among them.
        temperature: of the softmax.
    """

    def __init__(self, dim: int, scales: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.proj = nn.Sequential(
            nn.Conv2d(dim, scales, 3, padding=1, bias=False),
            nn.BatchNorm2d(scales),
            nn.Conv2d(scales, scales, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (self.proj(x) / self.temperature).softmax(dim=1)


def dilated_mean(x: Tensor, dilation: int) -> Tensor:
    """Mean over the 3x3 neighbours at a distance of ``dilation``, zeros beyond the border: ``[B, C, H, W]``, unchanged.

    Rows, then columns: four additions instead of eight.
    """
    height, width = x.shape[-2:]
    x = F.pad(x, (dilation,) * 4)
    x = x[..., :height, :] + x[..., dilation : dilation + height, :] + x[..., 2 * dilation : 2 * dilation + height, :]
    return (x[..., :width] + x[..., dilation : dilation + width] + x[..., 2 * dilation : 2 * dilation + width]) / 9


def pool_tokens(x: Tensor, weight: Tensor) -> Tensor:
    """Average every place over its own choice of neighbourhoods.

    Args:
        x: ``[B, C, H, W]``.
        weight: ``[B, scales, H, W]``: of the place itself, then of the 3x3 means of dilation 1, 2, ...

    Returns:
        ``[B, C, H, W]``.
    """
    y = x * weight[:, :1]
    for dilation in range(1, weight.shape[1]):
        y = y + dilated_mean(x, dilation) * weight[:, dilation : dilation + 1]
    return y


def diversification(attention: Tensor, threshold: float = 2.0) -> Tensor:
    """Mean cosine between what each query attends to and what all do together.

    Args:
        attention: ``[B, N, L, L]`` after the softmax.
        threshold: entries up to ``threshold / L`` count as nothing.

    Returns:
        A scalar; smaller is more diverse.
    """
    each = attention.mean(dim=1)
    together = each.mean(dim=1, keepdim=True)
    least = threshold / attention.shape[-1]
    each, together = (torch.where(t > least, t, 0.0) for t in (each, together))
    return F.cosine_similarity(together, each, dim=-1).mean()


def diversification_loss(attentions: Sequence[Tensor], threshold: float = 2.0) -> Tensor:
    """ADL: ``diversification`` over the attention ``[B, N, L, L]`` of all blocks."""
    return torch.stack([diversification(a, threshold) for a in attentions]).sum() / (len(attentions) + 1e-6)


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
