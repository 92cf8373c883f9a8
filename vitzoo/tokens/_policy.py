"""A learned decision on every token: the predictor, the masked softmax that lets it learn, and its losses.

DynamicViT (Rao et al. 2021, arXiv:2106.02034) and what was built on it share these.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers import Linear
from vitzoo.tokens._parts import QKV


class ScorePredictor(nn.Module):
    """Log-probabilities to keep and to drop each patch, from the patch and the mean of those that are left.

    Args:
        dim: channels C.

    Shape: ``[B, N, C]`` and a mask ``[B, N]`` to ``[B, N, 2]``; keys as published.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            Linear(dim, dim // 2), nn.GELU(), Linear(dim // 2, dim // 4), nn.GELU(), Linear(dim // 4, 2), nn.LogSoftmax(dim=-1)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        own, rest = self.in_conv(x).chunk(2, dim=-1)
        if mask is None:
            shared = rest.mean(dim=1, keepdim=True)
        else:
            shared = (rest * mask[..., None]).sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]
        return self.out_conv(torch.cat([own, shared.expand_as(rest)], dim=-1))


def gumbel(like: Tensor) -> Tensor:
    """Gumbel noise in the shape of ``like``."""
    return -torch.empty_like(like).exponential_().log()


def sampled_decision(log_probability: Tensor, noise: Tensor) -> Tensor:
    """1 where a token is kept, 0 where it is dropped, drawn from ``[B, N, 2]``; the gradient is that of the softmax."""
    soft = (log_probability + noise).softmax(dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), 2).to(soft.dtype)
    return (hard - soft.detach() + soft)[..., 0]


def policy_softmax(scores: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over tokens that take part, and over every token itself.

    Args:
        scores: ``[B, N, L, L]``.
        policy: ``[B, L]``: 1 for tokens that take part as keys, 0 for the others.
        eps: weight, over L, that every key gets beside.

    Returns:
        ``[B, N, L, L]`` in the dtype of the scores; computed in fp32. Differentiable in both.
    """
    length = policy.shape[1]
    itself = torch.eye(length, dtype=policy.dtype, device=policy.device)
    seen = policy[:, None, None, :]
    seen = seen + (1 - seen) * itself
    weight = (scores - scores.amax(dim=-1, keepdim=True)).float().exp() * seen.float()
    return ((weight + eps / length) / (weight.sum(dim=-1, keepdim=True) + eps)).to(scores.dtype)


def policy_attend(qkv: QKV, policy: Tensor) -> Tensor:
    """Attention with ``policy_softmax``: ``[B, L, N, D]``. It needs all scores."""
    q, k, v = (t.transpose(1, 2) for t in qkv[:3])
    scores = (q @ k.transpose(-2, -1)) * qkv.scale
    weight = policy_softmax(scores, policy)
    if qkv.dropout:
        weight = F.dropout(weight, qkv.dropout)
    return (weight @ v).transpose(1, 2)


def ratio_loss(decisions: Sequence[Tensor], ratios: Sequence[float]) -> Tensor:
    """How far each stage's share of kept tokens is from what it should be: mean squares over stages and images."""
    squares = [(decision.mean(dim=1) - ratio).square().mean() for decision, ratio in zip(decisions, ratios, strict=True)]
    return torch.stack(squares).mean()


def logit_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the student's class probabilities from the teacher's, ``[B, classes]``, per image."""
    return F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def token_distillation(tokens: Tensor, teacher: Tensor, alive: Tensor, squares: bool = True) -> Tensor:
    """How far the patches that are still alive are from the teacher's.

    Args:
        tokens: normed patches ``[B, N, C]``.
        teacher: the teacher's.
        alive: ``[B, N]``, 0 or 1.
        squares: mean squares (DeiT); else the divergence of softmaxes over the channels (LV-ViT).

    Returns:
        A scalar; 0 where nothing is alive.
    """
    mask = alive > 0.5
    if mask.sum() < 0.1:
        return tokens.sum() * 0.0
    ours, theirs = tokens[mask], teacher[mask]
    if squares:
        return F.mse_loss(ours, theirs)
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="batchmean", log_target=True)


class Teacher:
    """A frozen copy of a model as it was before its reduction. It is no part of the model's parameters or state_dict."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normed tokens ``[B, L, C]`` and logits, on the device of the images."""
        self.model.to(images.device)
        features = self.model.forward_features(images)
        return features, self.model.forward_head(features)
