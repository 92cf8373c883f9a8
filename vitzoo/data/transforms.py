"""timm's transforms, with the two repairs they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data import create_transform
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

__all__ = ["eval_transform", "keep_one_bit", "train_transform"]


class _AtLeastOneBit:
    """Level function of a posterize operation that never asks for 0 bits (a class, so that workers can pickle it)."""

    def __init__(self, level_fn: Callable[..., tuple[int, ...]]) -> None:
        self.level_fn = level_fn

    def __call__(self, *args: Any) -> tuple[int, ...]:
        (bits,) = self.level_fn(*args)
        return (max(1, bits),)


def keep_one_bit(transform: Any) -> int:
    """Repair the posterize operations inside a timm pipeline, however deeply nested; return how many were found.

    At full strength timm's ``PosterizeIncreasing`` asks for 0 bits. Pillow up to 12 answered with a black picture,
    Pillow 13 raises ValueError in the middle of an epoch (about 3 images in 1000 with rand-m9-mstd0.5-inc1).
    """
    if str(getattr(transform, "name", "")).startswith("Posterize"):
        if not isinstance(transform.level_fn, _AtLeastOneBit):
            transform.level_fn = _AtLeastOneBit(transform.level_fn)
        return 1
    if isinstance(transform, (list, tuple)):
        return sum(keep_one_bit(part) for part in transform)
    parts = [getattr(transform, name) for name in ("transforms", "ops", "policy") if hasattr(transform, name)]
    return sum(keep_one_bit(part) for part in parts)


def train_transform(config: dict[str, Any], *, affine: bool = False, **augmentation: Any) -> Callable[..., Any]:
    """timm's training pipeline for a data config (input_size, mean, std), with ``augmentation`` of ``create_transform``.

    With ``affine`` the picture is first turned (12 degrees), scaled and shifted (15 %) and sheared (8 degrees), as
    suits handwriting.
    """
    timm_pipeline = create_transform(
        input_size=config["input_size"], is_training=True, mean=config["mean"], std=config["std"], **augmentation
    )
    keep_one_bit(timm_pipeline)
    if not affine:
        return timm_pipeline
    turn = RandomAffine(12, translate=(0.15, 0.15), scale=(0.85, 1.15), shear=8, interpolation=InterpolationMode.BILINEAR)
    return Compose([turn, *timm_pipeline.transforms])


def eval_transform(config: dict[str, Any]) -> Callable[..., Any]:
    """timm's evaluation pipeline: resize to input size / crop_pct, centre crop, normalise, as the data config says."""
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return create_transform(**{key: config[key] for key in keys if key in config}, is_training=False)
