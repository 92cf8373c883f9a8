"""timm's losses and mixing of pictures."""

from __future__ import annotations

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from vitzoo.data.errors import UserError

__all__ = ["build_loss", "build_mixup"]


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


def build_loss(kind: str, smoothing: float, *, mixed: bool) -> nn.Module:
    """Loss of logits ``[B, C]`` and labels: ``[B]``, or soft and already smoothed ``[B, C]`` where they are ``mixed``.

    Args:
        kind: "ce" or "bce".
        smoothing: Label smoothing.
        mixed: The labels come from mixup.

    Returns:
        A module of (logits, labels) that returns the mean over the batch.

    Raises:
        UserError: Another kind.
    """
    if kind == "bce":
        return BinaryCrossEntropy(smoothing=0.0 if mixed else smoothing)
    if kind != "ce":
        raise UserError(f"model.loss is {kind!r} and must be 'ce' or 'bce'.")
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()
