"""A backbone as maps at the strides that a head asks for, at any image size.

Detectors and decoders want maps at strides 4, 8, 16, 32. A pyramid of the zoo gives them as they are. Where a stride is
missing, it is made from the nearest map: upwards by the transposed convolutions, downwards by the strided convolutions of
ViTDet's simple feature pyramid (Li et al. 2022, arXiv:2203.16527), which for a plain ViT is that pyramid itself.
``Maps.notes`` says what was done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn

from vitzoo.layers.maps import pad_image
from vitzoo.models import create_model
from vitzoo.models._contract import Backbone
from vitzoo.models._registry import entry_of
from vitzoo.tokens import options_of, reduce

__all__ = ["Maps", "Resample"]


class Resample(nn.Module):
    """From a map ``[B, C, h, w]`` to one of ``2**octaves`` times the resolution, ``[B, out_channels, ...]``.

    Up: 2x2 transposed convolutions that halve the channels (not below 32), with LayerNorm and GELU between. Down: 3x3
    convolutions of stride 2 that round sizes up and keep the channels.

    Args:
        channels: C.
        octaves: positive goes up, negative down.
    """

    def __init__(self, channels: int, octaves: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for i in range(abs(octaves)):
            if i:
                steps += [LayerNorm2d(channels), nn.GELU()]
            if octaves > 0:
                wide, channels = channels, min(channels, max(32, channels // 2))
                steps.append(nn.ConvTranspose2d(wide, channels, 2, 2))
            else:
                steps.append(nn.Conv2d(channels, channels, 3, 2, 1))
        self.steps = nn.Sequential(*steps)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(x)


class Maps(nn.Module):
    """Images ``[B, C, H, W]`` to one map ``[B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])]`` a stride.

    Args:
        name: a model of the zoo or of timm.
        strides: pixels per token of each map wanted, ascending powers of two.
        pretrained: load the backbone's published weights.
        norm: a LayerNorm for each map; None: where the backbone has not normed its maps itself.
        taps: a plain ViT's blocks to read, spread evenly over its depth, the early ones for the fine strides. 1: the last.
        checkpoint_stages: recompute these stages (blocks, in a plain ViT: all) in the backward pass; True: all of them.
        frozen: do not train the stem and the first ``frozen`` stages; 0 freezes the stem; None: nothing.
        token_reduction: a method of ``vitzoo.tokens`` in a plain transformer, by name, or a dict with ``name`` and options;
            maps stay whole.
        **kwargs: for ``create_model``: any field of the family's config.

    Attributes:
        channels: of each map.
        strides: of each map.
        notes: one sentence for everything that the adapter does beyond handing maps on; empty for a pyramid that fits.
        body: timm's features-only model.

    Raises:
        ValueError: an unknown name, strides that are not ascending powers of two, a stage that does not exist, a backbone
            whose tokens cannot be reduced.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (4, 8, 16, 32),
        *,
        pretrained: bool = False,
        norm: bool | None = None,
        taps: int = 1,
        checkpoint_stages: bool | Sequence[int] = (),
        frozen: int | None = None,
        token_reduction: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.name, self.strides = name, tuple(strides)
        if not self.strides or any(s < 1 or s & (s - 1) for s in self.strides) or sorted(set(self.strides)) != [*self.strides]:
            raise ValueError(f"strides are ascending powers of two such as (4, 8, 16, 32), got {self.strides}.")
        self.notes: list[str] = []
        self.frozen = frozen
        self.ours = entry_of(name) is not None
        method, options = (token_reduction, {}) if token_reduction is None else options_of(token_reduction, kwargs)
        self.body, self.fixed_size = self._build(name, pretrained, taps, kwargs)
        if method is not None:
            reduce(self.body, method, **options)
        channels, given = self.body.feature_info.channels(), [float(s) for s in self.body.feature_info.reduction()]

        self.image_scale = 1.0
        if self.fixed_size is not None:
            self.notes.append(f"{name} takes images of {_by(self.fixed_size)} only: each image is resized to that")
        elif not math.log2(given[-1]).is_integer():
            nearest = 2 ** round(math.log2(given[-1]))
            self.image_scale = given[-1] / nearest
            self.notes.append(f"the image is resized by {given[-1]:g}/{nearest}, so that a stride of {given[-1]:g} becomes one")
            given = [s / self.image_scale for s in given]
        self.given = given

        plain = len(given) > 1 and len(set(given)) == 1
        sources, octaves = [], []
        for i, wanted in enumerate(self.strides):
            if plain:
                source = min(i, len(given) - 1) if taps > 1 else len(given) - 1
            else:  # the last of the nearest maps; of two that are equally near the coarser, which has seen more
                distance = [(abs(math.log2(s / wanted)), -s, -j) for j, s in enumerate(given)]
                source = -min(distance)[2]
            sources.append(source)
            octaves.append(round(math.log2(given[source] / wanted)))
            if given[source] != wanted:
                how = "up" if octaves[-1] > 0 else "down" if octaves[-1] < 0 else "bilinearly"
                self.notes.append(f"stride {wanted} is made from the map at stride {given[source]:g} ({how})")
        self.sources = sources
        resample = [Resample(channels[j], o) for j, o in zip(sources, octaves, strict=True)]
        self.channels = tuple(r.out_channels for r in resample)
        self.resample = nn.ModuleList(resample)
        if getattr(getattr(self.model, "cfg", None), "feature_norm", False):  # a norm that nothing reads would never train
            norms: Any = self.model.feature_norms
            for j in set(range(len(given))) - set(sources):
                norms[j] = nn.Identity()
        if norm is None:
            norm = not self._normed()
        self.norms = nn.ModuleList(LayerNorm2d(c) if norm else nn.Identity() for c in self.channels)
        self._checkpoint(checkpoint_stages)
        if frozen is not None:
            self._freeze(frozen)

    def _build(self, name: str, pretrained: bool, taps: int, kwargs: dict[str, Any]) -> tuple[Any, tuple[int, int] | None]:
        """The features-only model, and the one image size it takes (None: any)."""
        entry = entry_of(name)
        if entry is not None:
            depth = kwargs.get("depth", getattr(entry.cfg, "depth", None))
            if depth is not None:
                indices = [depth * (i + 1) // taps - 1 for i in range(taps)]
                return create_model(name, pretrained, features_only=True, out_indices=indices, **kwargs), None
            return create_model(name, pretrained, features_only=True, **kwargs), None
        for flexible in ({"dynamic_img_size": True}, {"strict_img_size": False}):
            try:
                return create_model(name, pretrained, features_only=True, **flexible, **kwargs), None
            except TypeError:
                continue
        body = create_model(name, pretrained, features_only=True, **kwargs)
        cfg = getattr(getattr(body, "model", body), "pretrained_cfg", None) or getattr(body, "pretrained_cfg", None) or {}
        fixed = cfg.get("fixed_input_size") if isinstance(cfg, dict) else getattr(cfg, "fixed_input_size", False)
        if not fixed:
            return body, None
        height, width = (cfg["input_size"] if isinstance(cfg, dict) else cfg.input_size)[1:]
        return body, (height, width)

    def _normed(self) -> bool:
        """Whether the backbone norms the maps it puts out."""
        model = getattr(self.body, "model", None)
        if getattr(getattr(model, "cfg", None), "feature_norm", False):
            return True
        stages = getattr(model, "stages", None)
        return stages is not None and all(not isinstance(getattr(s, "norm", nn.Identity()), nn.Identity) for s in stages)

    @property
    def model(self) -> Any:
        """The backbone below timm's feature wrapper."""
        return getattr(self.body, "model", self.body)

    def _checkpoint(self, stages: bool | Sequence[int]) -> None:
        if stages is False or (stages is not True and len(stages) == 0):
            return
        own = getattr(self.model, "stages", None)
        if stages is True or own is None or not isinstance(self.model, Backbone):
            if not hasattr(self.model, "set_grad_checkpointing"):
                raise ValueError(f"{self.name} cannot recompute its stages: leave checkpoint_stages empty.")
            self.model.set_grad_checkpointing(True)
            return
        for i in stages:
            if not -len(own) <= i < len(own):
                raise ValueError(f"checkpoint_stages names stage {i}, and {self.name} has {len(own)}: 0 to {len(own) - 1}.")
            own[i].grad_checkpointing = True

    def _freeze(self, count: int) -> None:
        matcher = getattr(self.model, "group_matcher", None)
        if matcher is None:
            raise ValueError(f"{self.name} does not say which of its parameters belong to which stage: leave frozen None.")
        layers = group_parameters(self.model, matcher(coarse=True))
        last = max(layers)
        if not 0 <= count <= last:
            raise ValueError(f"frozen is {count}, and {self.name} has {last} stages or blocks: 0 to {last}.")
        named = dict(self.model.named_parameters())
        for layer, names in layers.items():
            if layer <= count:
                for name in names:
                    named[name].requires_grad_(False)

    def train(self, mode: bool = True) -> Maps:
        """As usual, but what is frozen stays in eval mode: no drop path, no running statistics."""
        super().train(mode)
        if mode and self.frozen is not None:
            for module in self.model.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[-2:]
        if self.fixed_size is not None:
            x = F.interpolate(x, size=self.fixed_size, mode="bilinear", align_corners=False, antialias=True)
        elif self.image_scale != 1:
            coarsest = round(max(self.given))
            x = pad_image(x, (coarsest, coarsest))
            size = [round(n * self.image_scale) for n in x.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        elif not self.ours:  # theirs may round a map's size down
            coarsest = round(max(*self.given, 32))
            x = pad_image(x, (coarsest, coarsest))
        found = self.body(x)
        maps = []
        for source, stride, resample, norm in zip(self.sources, self.strides, self.resample, self.norms, strict=True):
            y = resample(found[source])
            size = [-(-n // stride) for n in (height, width)]
            if self.fixed_size is not None or y.shape[-2] < size[0] or y.shape[-1] < size[1]:
                y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
            maps.append(norm(y[..., : size[0], : size[1]]))
        return maps


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def parameter_layers(maps: Maps) -> dict[str, int]:
    """Layer of each parameter of the backbone by its name within ``maps``, counted from the stem; for layer-wise rates.

    Args:
        maps: of a backbone with timm's ``group_matcher``.

    Returns:
        ``{"body.model....": layer}``; the last layer holds what follows the blocks.

    Raises:
        ValueError: the backbone does not know its layers.
    """
    matcher = getattr(maps.model, "group_matcher", None)
    if matcher is None:
        raise ValueError(f"{maps.name} does not say which of its parameters belong to which layer: leave layer_decay None.")
    groups = group_parameters(maps.model, matcher(coarse=False))
    prefix = "body.model." if maps.model is not maps.body else "body."
    return {prefix + name: layer for layer, names in groups.items() for name in names}


def undecayed(maps: Maps) -> set[str]:
    """Names within ``maps`` of the parameters that the backbone exempts from weight decay."""
    prefix = "body.model." if maps.model is not maps.body else "body."
    return {prefix + name for name in getattr(maps.model, "no_weight_decay", set)()}


def normalisation(maps: Maps) -> tuple[Any, Any]:
    """Mean and standard deviation a channel, of values in 0..1, that the backbone was trained with."""
    cfg = getattr(maps.model, "pretrained_cfg", None) or {}
    get = cfg.get if isinstance(cfg, dict) else lambda key: getattr(cfg, key, None)
    mean, std = get("mean"), get("std")
    return (list(mean), list(std)) if mean and std else ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
