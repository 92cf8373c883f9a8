"""timm's losses and mixing of pictures."""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from vitzoo.data.errors import UserError

__all__ = ["build_loss", "build_mixup", "dice_loss"]


def build_mixup(
    mixup: float, cutmix: float, prob: float, switch_prob: float, mode: str, smoothing: float, classes: int
) -> Mixup | None:
    """timm's mixup and cutmix with these alphas, or None where both are 0.

    It draws from NumPy's global generator, pairs a batch with its reverse (so the batch must be even) and returns soft
    labels ``[B, classes]``, smoothed.
    """
    if mixup <= 0 and cutmix <= 0:
        return None
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        prob=prob,
        switch_prob=switch_prob,
        mode=mode,
        label_smoothing=smoothing,
        num_classes=classes,
    )


def build_loss(kind: str, smoothing: float, *, mixed: bool, threshold: float | None = None, summed: bool = False) -> nn.Module:
    """Loss of logits ``[B, C]`` and labels: ``[B]``, or soft and already smoothed ``[B, C]`` where they are ``mixed``.

    Args:
        kind: "ce" or "bce".
        smoothing: Label smoothing.
        mixed: The labels come from mixup.
        threshold: With "bce": labels above it are 1, others 0.
        summed: With "bce": the sum over the classes instead of their mean.

    Returns:
        A module of (logits, labels) that returns the mean over the batch.

    Raises:
        UserError: Another kind.
    """
    if kind == "bce":
        return BinaryCrossEntropy(0.0 if mixed else smoothing, target_threshold=threshold, sum_classes=summed)
    if kind != "ce":
        raise UserError(f"model.loss is {kind!r} and must be 'ce' or 'bce'.")
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()


def dice_loss(logits: Tensor, labels: Tensor, ignore: int = 255) -> Tensor:
    """``1 - 2 sum(p t) / (sum(p) + sum(t))`` a class, over the batch, the mean over the classes that occur in it.

    Args:
        logits: ``[B, C, H, W]``.
        labels: ``[B, H, W]``; pixels of ``ignore`` take no part.
        ignore: see ``labels``.

    Returns:
        A scalar in 0..1.
    """
    known = (labels != ignore)[:, None]
    truth = F.one_hot(torch.where(known[:, 0], labels, 0), logits.shape[1]).permute(0, 3, 1, 2) * known
    probability = logits.softmax(1) * known
    axes = (0, 2, 3)
    overlap, both = (probability * truth).sum(axes), probability.sum(axes) + truth.sum(axes)
    occurs = truth.sum(axes) > 0
    return (1 - (2 * overlap + 1) / (both + 1))[occurs].mean()
