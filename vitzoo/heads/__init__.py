"""Backbones in detectors and segmenters; torchvision's detectors, segmentation_models_pytorch's decoders."""

from vitzoo.heads.detectors import DETECTORS, PyramidNeck, detector
from vitzoo.heads.dyhead import DynamicHead
from vitzoo.heads.maps import Maps
from vitzoo.heads.segmenters import SEGMENTERS, Segmenter, segmenter

__all__ = ["DETECTORS", "SEGMENTERS", "DynamicHead", "Maps", "PyramidNeck", "Segmenter", "detector", "segmenter"]
