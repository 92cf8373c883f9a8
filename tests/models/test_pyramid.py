from __future__ import annotations

import pytest
import torch

import vitzoo
from vitzoo.models import _pyramid


@pytest.mark.parametrize("tokens", [1, 600], ids=["image_by_image", "two_images"])
def test_a_stage_in_pieces_is_the_stage(monkeypatch, tokens):
    model, images = vitzoo.create_model("swin_micro").eval(), torch.randn(5, 3, 33, 47)
    with torch.no_grad():
        whole = model(images)
        monkeypatch.setattr(_pyramid, "CACHED_TOKENS", tokens)
        torch.testing.assert_close(model(images), whole)


def test_a_hook_on_a_block_sees_the_whole_batch(monkeypatch):
    monkeypatch.setattr(_pyramid, "CACHED_TOKENS", 1)
    model, seen = vitzoo.create_model("nat_micro").eval(), []
    model.stages[1].blocks[0].register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with torch.no_grad():
        model(torch.randn(3, 3, 32, 32))
    assert seen == [3]


def test_an_empty_batch_passes():
    with torch.no_grad():
        assert vitzoo.create_model("nat_micro").eval()(torch.randn(0, 3, 32, 32)).shape == (0, 1000)


def test_a_batch_norm_in_training_sees_the_whole_batch(monkeypatch):
    model, images = vitzoo.create_model("maxvit_micro").eval(), torch.randn(3, 3, 32, 32)
    model.stages[1].blocks[0].conv.norm1.train()
    with torch.no_grad():
        whole = model(images)
        monkeypatch.setattr(_pyramid, "CACHED_TOKENS", 1)
        torch.testing.assert_close(model(images), whole)
