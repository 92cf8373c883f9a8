"""Aggregation by class tokens: what they take of each patch, and one of them for each class."""

from __future__ import annotations

import torch

import vitzoo
from tests.models.zoo import build, image
from vitzoo import checkpoints
from vitzoo.models.patchconvnet import PatchConvNet

SMALL = {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 1, 1)}


def test_patch_weights_are_a_picture_of_the_patches():
    model = build("patchconvnet_micro")
    with torch.no_grad():
        weights = model.patch_weights(image(70, 93))
    assert weights.shape == (2, 1, 18, 24)
    assert (weights > 0).all()
    assert (weights.sum(dim=(2, 3)) < 1).all()  # the class token takes something of itself


def test_a_class_token_for_each_class_is_classified_by_its_own_row():
    model = PatchConvNet(**SMALL, per_class=True, num_classes=3).eval()
    published = {
        f"head.{c}.{name}": torch.randn(1, *shape) for c in range(3) for name, shape in (("weight", (16,)), ("bias", ()))
    }
    state = checkpoints.convert(published, model)
    assert {key: tuple(value.shape) for key, value in state.items()} == {"head.fc.weight": (3, 16), "head.fc.bias": (3,)}
    model.load_state_dict({**model.state_dict(), **state})
    x = image()
    with torch.no_grad():
        tokens = model.forward_features(x).flatten(2).mT
        c = model.head.norm(model.head.attention(model.head.classes(tokens), tokens))
        expected = [c[:, i] @ published[f"head.{i}.weight"][0] + published[f"head.{i}.bias"] for i in range(3)]
        torch.testing.assert_close(model(x), torch.stack(expected, dim=1))
        torch.testing.assert_close(model.patch_weights(x).sum(dim=(2, 3)), torch.ones(2, 3))


def test_class_tokens_follow_the_number_of_classes():
    model = PatchConvNet(**SMALL, per_class=True, num_classes=3)
    assert model.head.cls_token.shape == (1, 3, 16)
    model.reset_classifier(5)
    assert model(image()).shape == (2, 5)
    model.reset_classifier(0)
    assert model(image()).shape == (2, 16)
    model.reset_classifier(4)
    assert model(image()).shape == (2, 4)


def test_one_class_token_serves_any_number_of_classes():
    model = vitzoo.create_model("patchconvnet_micro")
    token = model.head.cls_token
    model.reset_classifier(5)
    assert model.head.cls_token is token
