"""Token-aware average pooling in front of attention, and a loss that drives attention apart; Guo et al. 2023, arXiv:2303.11126.

Each token chooses how wide a neighbourhood it is averaged over before it attends: a small convolutional network weighs the
token itself against 3x3 means of rising dilation. The diversification loss is small where queries attend to different keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import MixedAttention
from vitzoo.ops import attend

for _name in ("attend", "pool_tokens"):
    torch.fx.wrap(_name)


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


class PooledNorm(nn.LayerNorm):
    """LayerNorm of a map ``[B, H, W, C]`` whose tokens have been pooled: what attention reads; the residual stays as it is."""

    def __init__(self, dim: int, scales: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)
        self.predictor = DilationPredictor(dim, scales)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.permute(0, 3, 1, 2)
        return super().forward(pool_tokens(grid, self.predictor(grid)).permute(0, 2, 3, 1))


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


class DiverseAttention(MixedAttention):
    """Softmax attention among all tokens of a map, which can say afterwards who attended to whom.

    While ``listening`` it keeps q and k of the last call; ``heard`` hands out the attention they make. So nobody pays for
    scores but a loss that asks for them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.listening = False
        self.kept: tuple[Tensor, Tensor] | None = None

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.listening and isinstance(q, Tensor):  # not for what FX traces
            self.kept = (q, k)
        return self.gather(q, k, v).reshape(q.shape)

    def gather(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """From maps ``[B, H, W, C]`` to ``[B, H * W, N, D]``."""
        return attend(*(self.per_head(t) for t in (q, k, v)))

    def per_head(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` as ``[B, H * W, N, D]``."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, self.head_dim))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """What the softmax is taken of, ``[B, N, L, L]``, from maps ``[B, H, W, C]``."""
        return self.per_head(q * self.head_dim**-0.5).transpose(1, 2) @ self.per_head(k).permute(0, 2, 3, 1)

    def heard(self) -> Tensor | None:
        """The attention ``[B, N, L, L]`` of the last call, once; None where nobody listened."""
        if self.kept is None:
            return None
        q, k = self.kept
        self.kept = None
        return self.scores(q, k).softmax(dim=-1)


def listen(model: nn.Module, on: bool) -> None:
    """Let every ``DiverseAttention`` of a model keep what it is asked for, or not any more."""
    for module in model.modules():
        if isinstance(module, DiverseAttention):
            module.listening = on


def heard_diversification(model: nn.Module, threshold: float = 2.0) -> Tensor | None:
    """``diversification_loss`` of what has been heard in a model; None where nobody listened."""
    heard = [m.heard() for m in model.modules() if isinstance(m, DiverseAttention)]
    attentions = [attention for attention in heard if attention is not None]
    return diversification_loss(attentions, threshold) if attentions else None
