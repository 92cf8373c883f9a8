"""What the registry holds: names by wildcard and family, and facts about a model."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any

import timm
import torch

from vitzoo.models._contract import configure, pair
from vitzoo.models._cost import count_gmacs
from vitzoo.models._registry import _ENTRIES, checkpoints_of, entry_of, unknown_name


def list_models(
    filter: str | Sequence[str] = "",  # noqa: A002  # timm's name for it
    *,
    family: str | Sequence[str] = "",
    exclude: str | Sequence[str] = "",
    pretrained: bool = False,
) -> list[str]:
    """The zoo's models, sorted.

    Args:
        filter: wildcards, one or several; a name that matches any is listed ("swin*").
        family: families, one or several ("swin", "nat").
        exclude: wildcards of names to leave out.
        pretrained: list instead the names, with tags, that have published weights.

    Returns:
        Bare names, or names with tags.

    Raises:
        ValueError: a family that does not exist (with those that do).
    """
    wanted, filters, excluded = (_strings(value) for value in (family, filter, exclude))
    for name in wanted:
        if name not in list_families():
            raise ValueError(f"There is no family '{name}'. Families: {', '.join(list_families())}.")
    entries = [e for e in _ENTRIES.values() if not wanted or e.family in wanted]
    names = [n for e in entries for n in (checkpoints_of(e.name) if pretrained else [e.name])]
    return sorted(
        name
        for name in names
        if (not filters or any(fnmatch.fnmatchcase(name, f) for f in filters))
        and not any(fnmatch.fnmatchcase(name, f) for f in excluded)
    )


def list_pretrained(filter: str | Sequence[str] = "") -> list[str]:  # noqa: A002  # timm's name for it
    """Names, with tags, that ``create_model(name, pretrained=True)`` has weights for; ``list_models(pretrained=True)``.

    Args:
        filter: wildcards, one or several.

    Returns:
        Names, sorted.
    """
    return list_models(filter, pretrained=True)


def list_families() -> list[str]:
    """The families of the zoo, sorted."""
    return sorted({entry.family for entry in _ENTRIES.values()})


def _strings(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) and value else list(value)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What is known of a listed model.

    Attributes:
        name: bare name.
        timm_name: its name in timm's registry.
        family: its family.
        params: learned numbers, exact.
        img_size: rows and columns of the image it was published at.
        channels: channels of each default output of ``features_only``.
        strides: pixels per token of each.
        pretrained: names, with tags, of its published weights.
        top1: published ImageNet-1k top-1 in percent by name; no entry where none was published.
        published_gmacs: multiply-adds at ``img_size`` that its authors report, in billions; None where they report none.
        config: its frozen config.
    """

    name: str
    timm_name: str
    family: str
    params: int
    img_size: tuple[int, int]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    pretrained: tuple[str, ...]
    top1: dict[str, float]
    published_gmacs: float | None
    config: Any

    @property
    def gmacs(self) -> float:
        """Multiply-adds of one image of ``img_size``, in billions: products and convolutions, counted on the meta device."""
        entry = _ENTRIES[self.name]
        with torch.device("meta"):
            return count_gmacs(entry.cls(self.config), self.img_size)


def model_info(name: str, **overrides: Any) -> ModelInfo:
    """Facts about a listed model; it is built on the meta device, so this costs no memory.

    Args:
        name: a name of ``list_models()``.
        **overrides: fields of its config to change first (``num_classes=10``).

    Returns:
        What is known.

    Raises:
        ValueError: an unknown name (with the nearest known ones).
    """
    entry = entry_of(name)
    if entry is None:
        raise ValueError(unknown_name(name) + " (model_info knows vitzoo's own models.)")
    default = timm.get_pretrained_cfg(entry.timm_name)  # whose classifier create_model builds, 21,841 classes or none
    cfg = configure(entry.cfg, {"num_classes": default.num_classes, **overrides})
    with torch.device("meta"):
        model = entry.cls(cfg)
    rows = checkpoints_of(entry.name)
    infos = model.feature_info
    return ModelInfo(
        name=entry.name,
        timm_name=entry.timm_name,
        family=entry.family,
        params=sum(p.numel() for p in model.parameters()),
        img_size=pair(cfg.img_size or 224),
        channels=tuple(info["num_chs"] for info in infos),
        strides=tuple(info["reduction"] for info in infos),
        pretrained=tuple(rows),
        top1={n: row.top1 for n, row in rows.items() if row.top1 is not None and row.metric is None},
        published_gmacs=next((row.gmacs for row in rows.values() if row.gmacs is not None), None),
        config=cfg,
    )
