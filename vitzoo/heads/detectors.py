"""Torchvision's detectors on any backbone: ``detector("maskrcnn", backbone="nat_tiny", num_classes=80)``."""

from __future__ import annotations

import difflib
import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from vitzoo.heads.dyhead import DynamicHead
from vitzoo.heads.maps import Maps, normalisation

__all__ = ["DETECTORS", "PyramidAnchors", "PyramidNeck", "detector"]

DETECTORS = ("maskrcnn", "fasterrcnn", "retinanet", "fcos")


class PyramidNeck(nn.Module):
    """Backbone, feature pyramid (Lin et al. 2017, arXiv:1612.03144) and, where asked for, a dynamic head.

    What torchvision's detectors take as ``backbone``: images ``[B, 3, H, W]`` to an ordered dict of maps
    ``[B, out_channels, ceil(H / s), ceil(W / s)]``, finest first.

    Args:
        maps: the backbone.
        out_channels: of every map.
        extra: maps beyond the backbone's: 0; 1, a subsampled last map (RPN); 2, two strided convolutions (P6 and P7).
        dyhead: blocks of a dynamic head on top.
    """

    def __init__(self, maps: Maps, out_channels: int = 256, extra: int = 0, dyhead: int = 0) -> None:
        super().__init__()
        blocks: Any = {0: None, 1: LastLevelMaxPool(), 2: LastLevelP6P7(out_channels, out_channels)}
        if extra not in blocks:
            raise ValueError(f"A feature pyramid has 0, 1 or 2 extra maps, got {extra}.")
        self.maps = maps
        self.fpn = FeaturePyramidNetwork(list(maps.channels), out_channels, blocks[extra])
        self.dyhead = DynamicHead(out_channels, dyhead) if dyhead else None
        self.out_channels = out_channels
        self.strides = maps.strides + tuple(maps.strides[-1] * 2 ** (i + 1) for i in range(extra))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        named = OrderedDict((str(i), m) for i, m in enumerate(self.maps(x)))
        found = self.fpn(named)
        if self.dyhead is not None:
            found = OrderedDict(zip(found, self.dyhead(list(found.values())), strict=True))
        return found


class PyramidAnchors(AnchorGenerator):
    """Anchors at the pyramid's own strides.

    Torchvision divides the image size by the map size, rounding down, which moves the anchors of a map whose size was
    rounded up (25 tokens halve to 13: 61 pixels a token instead of 64).

    Args:
        strides: pixels per token of each map.
        sizes: edge lengths in pixels, a tuple for each map.
        ratios: height over width.
    """

    def __init__(self, strides: Sequence[int], sizes: Sequence[Sequence[float]], ratios: Sequence[float]) -> None:
        super().__init__(tuple(tuple(s) for s in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        grids = [m.shape[-2:] for m in feature_maps]
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(s, device=device)] * 2 for s in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, steps))
        return [anchors] * len(image_list.image_sizes)


def detector(
    kind: str,
    backbone: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    strides: Sequence[int] | None = None,
    extra: int | None = None,
    channels: int = 256,
    dyhead: int = 0,
    head_convs: int = 4,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    checkpoint_stages: bool | Sequence[int] = (),
    frozen: int | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """One of torchvision's detectors with a feature pyramid over any backbone.

    Training: ``model(images, targets)`` returns a dict of losses; evaluation: ``model(images)`` returns for each image
    ``boxes`` ``[n, 4]`` (x1, y1, x2, y2 in pixels), ``labels``, ``scores`` and, with "maskrcnn", ``masks`` ``[n, 1, H, W]``.
    Images are lists of ``[3, H, W]`` in 0..1 of any sizes; the model normalises as its backbone was trained. Labels count
    from 1, 0 is the background, in every kind. ``model.backbone.maps.notes`` says what was done to the backbone's maps.

    Args:
        kind: "maskrcnn", "fasterrcnn", "retinanet" or "fcos".
        backbone: a model of the zoo or of timm.
        num_classes: object classes, the background not counted.
        pretrained: the backbone's published weights.
        strides: of the backbone's maps; None: 4 to 32 for the R-CNNs, 8 to 32 for the others.
        extra: maps beyond; None: one for the R-CNNs, two for the others.
        channels: of the pyramid.
        dyhead: blocks of a dynamic head after the pyramid.
        head_convs: convolutions of FCOS' towers.
        min_size: shorter edge that images are resized to; several: one is drawn for each training image.
        max_size: longest edge after that.
        checkpoint_stages: stages that are recomputed in the backward pass; True: all.
        frozen: do not train the stem and this many stages.
        backbone_kwargs: fields of the backbone's config.
        **kwargs: what torchvision's class takes: ``box_score_thresh``, ``detections_per_img``, ...

    Returns:
        torchvision's model.

    Raises:
        ValueError: an unknown kind or backbone; names the nearest known.
        TypeError: an argument that neither the backbone nor the detector takes.
    """
    kind = kind.lower().replace("_", "").replace("-", "")
    if kind not in DETECTORS:
        near = difflib.get_close_matches(kind, DETECTORS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"There is no detector '{kind}'.{hint} There are: {', '.join(DETECTORS)}.")
    two_stages = kind in ("maskrcnn", "fasterrcnn")
    classes: Any = {"maskrcnn": MaskRCNN, "fasterrcnn": FasterRCNN, "retinanet": RetinaNet, "fcos": FCOS}[kind]
    known = set(inspect.signature(classes.__init__).parameters) | set(inspect.signature(FasterRCNN.__init__).parameters)
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise TypeError(f"{classes.__name__} does not take '{name}'.{hint}")
    maps = Maps(
        backbone,
        strides or ((4, 8, 16, 32) if two_stages else (8, 16, 32)),
        pretrained=pretrained,
        checkpoint_stages=checkpoint_stages,
        frozen=frozen,
        **(backbone_kwargs or {}),
    )
    neck = PyramidNeck(maps, channels, (1 if two_stages else 2) if extra is None else extra, dyhead)
    mean, std = normalisation(maps)
    common: dict[str, Any] = {"min_size": min_size, "max_size": max_size, "image_mean": mean, "image_std": std}
    if two_stages:
        common["rpn_anchor_generator"] = PyramidAnchors(neck.strides, [(8.0 * s,) for s in neck.strides], (0.5, 1.0, 2.0))
        levels = [str(i) for i in range(len(maps.strides))]
        common["box_roi_pool"] = MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2)
        if kind == "maskrcnn":
            common["mask_roi_pool"] = MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2)
    elif kind == "retinanet":
        sizes = [tuple(4.0 * s * 2 ** (i / 3) for i in range(3)) for s in neck.strides]
        common["anchor_generator"] = PyramidAnchors(neck.strides, sizes, (0.5, 1.0, 2.0))
    else:
        anchors = PyramidAnchors(neck.strides, [(float(s),) for s in neck.strides], (1.0,))
        head = FCOSHead(channels, anchors.num_anchors_per_location()[0], num_classes + 1, num_convs=head_convs)
        common |= {"anchor_generator": anchors, "head": head}
    return classes(neck, num_classes=num_classes + 1, **{**common, **kwargs})
