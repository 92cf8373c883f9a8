"""Any backbone as a backbone of OpenMMLab's libraries and of Detectron2, by their documented interfaces.

Neither library is needed to import this. segmentation_models_pytorch (``tu-NAME``), Hugging Face (``TimmBackbone``) and
torchvision take a backbone by its timm name, without an adapter.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from vitzoo.heads.maps import Maps

__all__ = ["Detectron2Backbone", "OpenMMLabBackbone", "register_detectron2", "register_openmmlab"]


class OpenMMLabBackbone(nn.Module):
    """A backbone for MMDetection and MMSegmentation: images ``[B, 3, H, W]`` to a tuple of maps.

    In a config, after :func:`register_openmmlab`::

        backbone = dict(type="OpenMMLabBackbone", name="nat_tiny", pretrained=True, frozen_stages=1, drop_path_rate=0.2)
        neck = dict(type="FPN", in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5)

    ``in_channels`` is ``OpenMMLabBackbone(name).channels``.

    Args:
        name: a model of the zoo or of timm.
        strides: of the maps.
        pretrained: load the backbone's published weights.
        frozen_stages: as in MMDetection's Swin: -1 freezes nothing, 0 the stem, k the stem and k stages.
        with_cp: recompute the stages in the backward pass.
        norm: see :class:`vitzoo.heads.Maps`.
        init_cfg: accepted because every module of OpenMMLab is given it; only None is supported.
        **kwargs: fields of the family's config.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int] = (4, 8, 16, 32),
        pretrained: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        norm: bool | None = None,
        init_cfg: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            raise ValueError("init_cfg is not supported: give pretrained=True, or load the whole detector with load_from.")
        frozen = None if frozen_stages < 0 else frozen_stages
        self.maps = Maps(name, strides, pretrained=pretrained, frozen=frozen, checkpoint_stages=with_cp, norm=norm, **kwargs)
        self.channels = list(self.maps.channels)

    def init_weights(self) -> None:
        """Nothing to do: weights are drawn or loaded when the backbone is built. MMEngine's runner calls this."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.maps(x))


def register_openmmlab(registry: Any = None) -> None:
    """Make ``dict(type="OpenMMLabBackbone", ...)`` known in configs.

    Args:
        registry: an ``mmengine.registry.Registry``; None: MMEngine's root ``MODELS``, from which MMDetection's and
            MMSegmentation's inherit.

    Raises:
        ImportError: no registry was given and mmengine is not installed.
    """
    if registry is None:
        try:
            registry = importlib.import_module("mmengine.registry").MODELS
        except ImportError as error:
            raise ImportError("mmengine is not installed: give the registry, or pip install mmengine mmdet.") from error
    registry.register_module(module=OpenMMLabBackbone, force=True)


class _ShapeSpec(NamedTuple):
    """Detectron2's ``ShapeSpec``, where that library is not installed."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class Detectron2Backbone(nn.Module):
    """A backbone by Detectron2's interface: images ``[B, 3, H, W]`` to a dict of maps, with ``output_shape()``.

    Detectron2's ``FPN(bottom_up=Detectron2Backbone("nat_tiny"), in_features=["stage2", ..., "stage5"], ...)`` takes it.

    Args:
        name: a model of the zoo or of timm.
        strides: of the maps; the map at stride ``2**k`` is called ``stage{k}``.
        **kwargs: for :class:`vitzoo.heads.Maps`.
    """

    def __init__(self, name: str, strides: Sequence[int] = (4, 8, 16, 32), **kwargs: Any) -> None:
        super().__init__()
        self.maps = Maps(name, strides, **kwargs)
        self._out_features = [f"stage{s.bit_length() - 1}" for s in self.maps.strides]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self._out_features, self.maps(x), strict=True))

    def output_shape(self) -> dict[str, Any]:
        """Name of each map to a ``ShapeSpec`` with its channels and stride."""
        try:
            spec: Any = importlib.import_module("detectron2.layers").ShapeSpec
        except ImportError:
            spec = _ShapeSpec
        described = zip(self._out_features, self.maps.channels, self.maps.strides, strict=True)
        return {name: spec(channels=channels, stride=stride) for name, channels, stride in described}

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of this: feature pyramids that double sizes need it, the backbone does not."""
        return self.maps.strides[-1]

    @property
    def padding_constraints(self) -> dict[str, int]:
        """As Detectron2 asks: no square images needed."""
        return {"square_size": 0}


def register_detectron2(registry: Any = None) -> None:
    """Make ``MODEL.BACKBONE.NAME = "build_vitzoo_backbone"`` known, which reads ``cfg.MODEL.VITZOO.NAME``.

    Args:
        registry: Detectron2's ``BACKBONE_REGISTRY``; None: imported.

    Raises:
        ImportError: no registry was given and detectron2 is not installed.
    """
    if registry is None:
        try:
            registry = importlib.import_module("detectron2.modeling").BACKBONE_REGISTRY
        except ImportError as error:
            raise ImportError("detectron2 is not installed: give the registry, or install it.") from error

    def build_vitzoo_backbone(cfg: Any, input_shape: Any) -> Detectron2Backbone:
        del input_shape
        return Detectron2Backbone(cfg.MODEL.VITZOO.NAME, pretrained=getattr(cfg.MODEL.VITZOO, "PRETRAINED", False))

    registry.register(build_vitzoo_backbone)
