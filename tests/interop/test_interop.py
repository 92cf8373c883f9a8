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


def _upernet(backbone):
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    config = UperNetConfig(
        backbone_config=backbone, hidden_size=32, auxiliary_in_channels=256, auxiliary_channels=16, num_labels=4
    )
    return UperNetForSemanticSegmentation(config), "logits"


def _mask2former(backbone):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1, decoder_layers=2,
        encoder_feedforward_dim=32, dim_feedforward=32, num_attention_heads=4, num_queries=5, num_labels=3,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config), "masks_queries_logits"


def _detr(backbone):
    from transformers import DetrConfig, DetrForObjectDetection

    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=32,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
        decoder_ffn_dim=32, num_queries=5, num_labels=3,
    )  # fmt: skip
    return DetrForObjectDetection(config), "pred_boxes"


@pytest.mark.parametrize("build", [_upernet, _mask2former, _detr], ids=["UperNet", "Mask2Former", "DETR"])
def test_hugging_face_heads_train_on_the_registered_name(build, shallow_models):
    from transformers import TimmBackboneConfig

    backbone = TimmBackboneConfig(backbone="nat_tiny", out_indices=(0, 1, 2, 3), use_pretrained_backbone=False)
    model, output = build(backbone)
    found = getattr(model.train()(torch.randn(2, 3, 96, 128)), output)
    assert found.isfinite().all()
    found.square().mean().backward()
    learned = [p.grad for name, p in model.named_parameters() if "backbone" in name]
    assert sum(grad is not None for grad in learned) > 20


class Registry:
    """The part of MMEngine's and Detectron2's registries that registering a module uses."""

    def __init__(self) -> None:
        self.known: dict[str, object] = {}

    def register_module(self, name=None, force=False, module=None):
        assert force or module.__name__ not in self.known
        self.known[name or module.__name__] = module

    def register(self, obj):
        self.known[obj.__name__] = obj

    def build(self, cfg):
        cfg = dict(cfg)
        return self.known[cfg.pop("type")](**cfg)


def test_an_openmmlab_config_builds_a_backbone_by_its_documented_interface():
    from vitzoo.heads.interop import OpenMMLabBackbone, register_openmmlab

    models = Registry()
    register_openmmlab(models)
    register_openmmlab(models)  # again: no complaint
    config = {"type": "OpenMMLabBackbone", "name": "nat_micro", "frozen_stages": 1, "with_cp": True, "drop_path_rate": 0.1}
    backbone = models.build(config)
    assert isinstance(backbone, OpenMMLabBackbone)
    backbone.init_weights()
    maps = backbone.train()(torch.randn(2, 3, 100, 132))
    assert isinstance(maps, tuple)
    assert [m.shape[1] for m in maps] == backbone.channels
    assert [tuple(m.shape[2:]) for m in maps] == [(25, 33), (13, 17), (7, 9), (4, 5)]
    sum(m.mean() for m in maps).backward()
    assert all(p.grad is None for p in backbone.maps.model.stem.parameters())
    assert all(p.grad is not None for p in backbone.maps.model.stages[1].parameters())
    with pytest.raises(ValueError, match="init_cfg"):
        OpenMMLabBackbone("nat_micro", init_cfg={"type": "Pretrained"})


def test_a_detectron2_pyramid_takes_a_backbone_by_its_documented_interface():
    from types import SimpleNamespace

    from vitzoo.heads.interop import register_detectron2

    registry = Registry()
    register_detectron2(registry)
    cfg = SimpleNamespace(MODEL=SimpleNamespace(VITZOO=SimpleNamespace(NAME="nat_micro", PRETRAINED=False)))
    bottom_up = registry.known["build_vitzoo_backbone"](cfg, None)
    shapes = bottom_up.output_shape()
    maps = bottom_up(torch.randn(1, 3, 96, 160))
    assert list(maps) == list(shapes) == ["stage2", "stage3", "stage4", "stage5"]
    for name, spec in shapes.items():
        assert maps[name].shape == (1, spec.channels, 96 // spec.stride, 160 // spec.stride)
    assert bottom_up.size_divisibility == 32
    # what detectron2.modeling.FPN does with it
    lateral = {name: nn.Conv2d(spec.channels, 8, 1) for name, spec in shapes.items()}
    x = lateral["stage5"](maps["stage5"])
    for name in ("stage4", "stage3", "stage2"):
        x = lateral[name](maps[name]) + nn.functional.interpolate(x, scale_factor=2.0)
    assert x.shape == (1, 8, 24, 40)
