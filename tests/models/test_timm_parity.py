"""Where timm has the model too, its weights give its numbers in ours: loaded through vitzoo.checkpoints, drawn at random."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vitzoo
from vitzoo import checkpoints

# name: images at which both compute the same. timm pads Swin's maps after the norm and the shift, so there: what divides
NAMES = {
    "swin_tiny_patch4_window7_224": (224, 224),
    "swinv2_tiny_window8_256": (256, 256),
    "vit_tiny_patch16_224": (224, 224),
    "vit_small_patch14_reg4_dinov2": (518, 518),
    "deit_tiny_distilled_patch16_224": (224, 224),
    "deit3_small_patch16_224": (224, 224),
    "pvt_v2_b0": (70, 93),
}


def shallow(name: str) -> dict[str, object]:
    """Few blocks, all kinds of them: parity of one is parity of twelve."""
    return {"depths": (2, 2, 2, 2)} if name.startswith(("swin", "pvt")) else {"depth": 3}


@pytest.fixture(scope="module", params=NAMES)
def pair(request) -> tuple[str, nn.Module, nn.Module]:
    """timm's model, every parameter off its initial value, and ours with its weights."""
    name = request.param
    torch.manual_seed(3)
    theirs = timm.create_model(name, **shallow(name)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ours = vitzoo.create_model(name, **shallow(name)).eval()
    ours.load_state_dict(checkpoints.convert(theirs.state_dict(), ours), strict=True)
    return name, ours, theirs


def test_logits_and_features_equal_timms(pair):
    name, ours, theirs = pair
    x = torch.randn(1, 3, *NAMES[name])
    with torch.no_grad():
        logits, expected = ours(x), theirs(x)
        maps = ours.forward_intermediates(x, intermediates_only=True)
        their_maps = theirs.forward_intermediates(x, intermediates_only=True)
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * scale)
    for mine, other in zip(maps, their_maps, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * other.abs().max().item())


def test_gradients_equal_timms(pair):
    name, ours, theirs = pair
    x = torch.randn(1, 3, *NAMES[name])
    for model in (ours, theirs):
        model.zero_grad()
        output = model(x)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    published = {key: p.grad for key, p in theirs.named_parameters()}
    expected = checkpoints.convert(published, ours)
    for key, p in ours.named_parameters():
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(p.grad, expected[key], rtol=0, atol=2e-4 * scale, msg=lambda m, key=key: f"{key}: {m}")
