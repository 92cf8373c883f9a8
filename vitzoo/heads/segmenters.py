"""smp's decoders on any backbone: ``segmenter("upernet", backbone="nat_tiny", num_classes=150)``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.heads.maps import Maps, normalisation
from vitzoo.layers.maps import pad_image

__all__ = ["SEGMENTERS", "Segmenter", "segmenter"]

SEGMENTERS = ("upernet", "fpn", "segformer", "deeplabv3+", "dpt", "unet")


class Segmenter(nn.Module):
    """Images ``[B, 3, H, W]``, normalised, to logits ``[B, classes, H, W]``.

    The image is padded to whole multiples of the coarsest stride before the backbone and the logits are cropped, because
    the decoders double sizes; at sizes that divide nothing is padded.

    Args:
        maps: the backbone, maps at 4, 8, 16, 32.
        decoder: of smp's kind.
        width: channels that the decoder puts out.
        num_classes: of the logits.
        kind: which decoder it is; see :data:`SEGMENTERS`.
        aux: an auxiliary head on the map at stride 16, for training.

    Attributes:
        maps: the backbone.
        mean: a channel, of values in 0..1, that images are to be normalised with.
        std: likewise.
    """

    def __init__(self, maps: Maps, decoder: nn.Module, width: int, num_classes: int, kind: str, aux: bool = False) -> None:
        super().__init__()
        self.maps, self.decoder, self.kind = maps, decoder, kind
        self.head = nn.Conv2d(width, num_classes, 1)
        self.aux: nn.Module | None = None
        if aux:
            middle = maps.channels[-2]
            self.aux = nn.Sequential(
                nn.Conv2d(middle, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(), nn.Conv2d(256, num_classes, 1)
            )
        self.mean, self.std = normalisation(maps)

    def forward(self, x: Tensor) -> Tensor:
        """Logits at the size of the image."""
        return self._logits(x)[0]

    def with_aux(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and those of the auxiliary head at the same size (None without one)."""
        logits, maps, size = self._logits(x)
        if self.aux is None:
            return logits, None
        return logits, _enlarge(self.aux(maps[-2]), size)[..., : x.shape[-2], : x.shape[-1]]

    def _logits(self, x: Tensor) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
        height, width = x.shape[-2:]
        coarsest = self.maps.strides[-1]
        x = pad_image(x, (coarsest, coarsest))
        size = (x.shape[-2], x.shape[-1])
        maps = self.maps(x)
        if self.kind == "dpt":
            found = self.decoder(maps, [None] * len(maps))
        else:
            half = x.new_empty(x.shape[0], 0, size[0] // 2, size[1] // 2)  # smp's place for a map at stride 2
            ladder = [x, half, *maps]
            if self.kind == "deeplabv3+":  # made for backbones that end at stride 16
                ladder[-1] = _enlarge(maps[-1], (size[0] // 16, size[1] // 16))
            found = self.decoder(ladder)
        return _enlarge(self.head(found), size)[..., :height, :width], maps, size


def _enlarge(x: Tensor, size: Any) -> Tensor:
    if x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def segmenter(
    kind: str,
    backbone: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    channels: int | None = None,
    aux: bool = False,
    dropout: float | None = None,
    checkpoint_stages: bool | Sequence[int] = (),
    frozen: int | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Segmenter:
    """One of smp's decoders over any backbone.

    Args:
        kind: "upernet", "fpn", "segformer", "deeplabv3+", "dpt" or "unet".
        backbone: a model of the zoo or of timm.
        num_classes: of the logits.
        pretrained: the backbone's published weights.
        channels: of the decoder; None: smp's default.
        aux: an auxiliary head on the map at stride 16 (UPerNet's recipe).
        dropout: of the decoders that have one ("fpn", "deeplabv3+"); None: smp's default.
        checkpoint_stages: stages that are recomputed in the backward pass; True: all.
        frozen: do not train the stem and this many stages.
        backbone_kwargs: fields of the backbone's config.
        **kwargs: what smp's decoder takes.

    Returns:
        The segmenter; ``.maps.notes`` says what was done to the backbone's maps.

    Raises:
        ValueError: an unknown kind or backbone; names the nearest known.
        TypeError: an argument that neither the backbone nor the decoder takes.
        ImportError: segmentation_models_pytorch is not installed.
    """
    kind = {"deeplabv3plus": "deeplabv3+", "uper": "upernet"}.get(kind.lower(), kind.lower())
    if kind not in SEGMENTERS:
        near = difflib.get_close_matches(kind, SEGMENTERS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"There is no segmenter '{kind}'.{hint} There are: {', '.join(SEGMENTERS)}.")
    if dropout is not None and kind not in ("fpn", "deeplabv3+"):
        raise ValueError(f"The decoder of '{kind}' has no dropout: leave it None.")
    strides: tuple[int, ...] = (4, 8, 16, 32)
    if kind == "deeplabv3+":  # reads no other maps
        strides = (4, 16, 32) if aux else (4, 32)
    maps = Maps(
        backbone,
        strides,
        pretrained=pretrained,
        norm=False if kind == "upernet" else None,  # its decoder norms what it gets
        taps=4 if kind == "dpt" else 1,
        checkpoint_stages=checkpoint_stages,
        frozen=frozen,
        **(backbone_kwargs or {}),
    )
    decoder, width = _decoder(kind, (3, 0, *maps.channels), channels, dropout, kwargs)
    if kind == "deeplabv3+":
        maps.notes.append("the map at stride 32 is resized to stride 16 before the atrous pyramid")
    return Segmenter(maps, decoder, width, num_classes, kind, aux)


def _decoder(
    kind: str, ladder: Sequence[int], channels: int | None, dropout: float | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, int]:
    """smp's decoder and the channels that it puts out."""
    try:
        from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
        from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
    except ModuleNotFoundError as error:
        raise ImportError(f"Segmenters need segmentation_models_pytorch: pip install 'vitzoo[dense]' ({error}).") from error

    width = channels or 256
    if kind == "upernet":
        return UPerNetDecoder(ladder, 5, width, **kwargs), width
    if kind == "fpn":
        last = kwargs.pop("segmentation_channels", channels or 128)
        more = {} if dropout is None else {"dropout": dropout}
        return FPNDecoder(ladder, 5, width, last, **more, **kwargs), last
    if kind == "segformer":
        return SegformerDecoder(ladder, 5, width, **kwargs), width
    if kind == "deeplabv3+":
        settings: dict[str, Any] = {
            "atrous_rates": (12, 24, 36),
            "aspp_separable": True,
            "aspp_dropout": 0.5 if dropout is None else dropout,
        }
        return DeepLabV3PlusDecoder(ladder, 5, width, output_stride=16, **{**settings, **kwargs}), width
    if kind == "dpt":
        widths = [c if channels else w for c, w in zip((width,) * 4, (256, 512, 1024, 1024), strict=True)]
        settings = {"intermediate_channels": widths, "readout": "ignore", "encoder_has_prefix_tokens": False}
        return DPTDecoder(ladder[2:], (4, 8, 16, 32), fusion_channels=width, **{**settings, **kwargs}), width
    steps = tuple(kwargs.pop("decoder_channels", (width, width // 2, width // 4, width // 8, width // 16)))
    return UnetDecoder(ladder, steps, **kwargs), steps[-1]
