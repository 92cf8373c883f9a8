"""timm's halo and bottleneck attention through our op: equal where timm runs, and running where it does not."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import vitzoo
from vitzoo.layers import with_our_attention
from vitzoo.layers.relative import BottleneckAttention, HaloAttention


def moved(name: str) -> torch.nn.Module:
    """A timm model in eval mode whose parameters are all off their initial value."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.mark.parametrize(
    ("name", "size"), [("halonet26t", 256), ("haloregnetz_b", 224), ("botnet26t_256", 256), ("lamhalobotnet50ts_256", 256)]
)
def test_equals_timms_model_with_its_weights(name, size):
    theirs = moved(name)
    ours = with_our_attention(copy.deepcopy(theirs))
    assert any(isinstance(m, HaloAttention | BottleneckAttention) for m in ours.modules())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = theirs(x)
        assert (ours(x) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["halonet26t", "botnet26t_256"])
def test_takes_images_that_timm_refuses(name):
    x = torch.randn(1, 3, 250, 330)
    with pytest.raises(AssertionError):
        timm.create_model(name)(x)
    backbone = vitzoo.create_model(name, features_only=True)
    sizes = [(-(-250 // r), -(-330 // r)) for r in backbone.feature_info.reduction()]
    assert [tuple(m.shape[2:]) for m in backbone(x)] == sizes


def test_every_parameter_learns():
    model = vitzoo.create_model("halonet26t", num_classes=3)
    model(torch.randn(2, 3, 64, 96)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_other_models_of_timm_stay_as_they_are():
    assert not any("vitzoo" in type(m).__module__ for m in vitzoo.create_model("resnet18").modules())
