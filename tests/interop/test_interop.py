"""The libraries that take a backbone by its timm name take ours."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import vitzoo  # noqa: F401  # registers the names with timm

# few blocks of every stage: decoders see the maps, not the depth
SHALLOW = {"nat_tiny": {"depths": (1, 1, 1, 1)}, "vz_swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)}}


@pytest.fixture
def shallow_models(monkeypatch):
    """Decoders build their encoder by name with the keywords they know, so the depth is changed below them."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **SHALLOW.get(name, {}), **kwargs))


@pytest.mark.parametrize("decoder", ["Unet", "FPN", "UPerNet"])
@pytest.mark.parametrize("encoder", SHALLOW)
def test_smp_decoders_run_forward_and_backward(decoder, encoder, shallow_models):
    model = getattr(smp, decoder)(encoder_name=f"tu-{encoder}", encoder_weights=None, classes=5)
    masks = model(torch.randn(2, 3, 64, 96))
    assert masks.shape == (2, 5, 64, 96)
    masks.square().mean().backward()
    without = [name for name, p in model.encoder.named_parameters() if p.grad is None and ".norm." not in name]
    # an untrained final norm of the backbone belongs to its classifier, which a decoder does not use
    assert [name for name in without if not name.startswith("model.norm")] == []


def test_a_decoder_that_wants_dilation_is_told_in_a_sentence():
    with pytest.raises(ValueError, match="output_stride"):
        smp.DeepLabV3Plus(encoder_name="tu-nat_micro", encoder_weights=None)


def test_hugging_face_takes_the_registered_name():
    from transformers import TimmBackbone, TimmBackboneConfig

    config = TimmBackboneConfig(backbone="nat_micro", out_indices=(0, 1, 2), use_pretrained_backbone=False)
    backbone = TimmBackbone(config).eval()
    maps = backbone(torch.randn(1, 3, 50, 70)).feature_maps
    assert [tuple(m.shape) for m in maps] == [(1, 32, 13, 18), (1, 64, 7, 9), (1, 128, 4, 5)]
    assert backbone.channels == [32, 64, 128]


class Pyramid(nn.Module):
    """Ten lines between any backbone of timm's registry and torchvision's detectors."""

    def __init__(self, name: str, out_channels: int = 64) -> None:
        super().__init__()
        self.body = timm.create_model(name, features_only=True)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), out_channels)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(x))))


def test_torchvision_trains_and_runs_a_detector_on_our_features():
    backbone = Pyramid("nat_micro")
    levels = len(backbone.body.feature_info.channels())
    detector = FasterRCNN(
        backbone,
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(tuple((s,) for s in (16, 32, 64)[:levels]), ((0.5, 1.0, 2.0),) * levels),
        box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(levels)], output_size=7, sampling_ratio=2),
        min_size=96,
        max_size=160,
    )
    images = [torch.rand(3, 90, 120), torch.rand(3, 70, 133)]
    targets = [{"boxes": torch.tensor([[5.0, 8.0, 60.0, 50.0]]), "labels": torch.tensor([1])} for _ in images]
    sum(detector(images, targets).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.body.parameters() if p.requires_grad)
    with torch.no_grad():
        found = detector.eval()(images)
    assert {"boxes", "labels", "scores"} <= set(found[0])
