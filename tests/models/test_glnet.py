"""Slots that can be looked at, and the shell of Swin-T around them."""

from __future__ import annotations

import pytest
import torch

from tests.models.zoo import build, ceil_div, image


def test_slot_maps_share_out_every_token_of_every_block_with_slots():
    model = build("glnet_micro")
    with torch.no_grad():
        before = model(image(70, 93))
        maps = model.slot_maps(image(70, 93))
        assert torch.equal(model(image(70, 93)), before)  # nothing is left behind in the model
    sizes = {"stages.0.blocks.0.attn": (18, 24), "stages.1.blocks.0.attn": (9, 12)}
    assert {name: tuple(m.shape) for name, m in maps.items()} == {name: (2, 4, *size) for name, size in sizes.items()}
    for m in maps.values():
        torch.testing.assert_close(m.sum(dim=1), torch.ones_like(m[:, 0]))
        assert m.std(dim=(2, 3)).min() > 0  # places differ


def test_tokens_of_a_color_share_a_slot():
    model = build("glnet_micro", depths=(1, 1, 1))
    with torch.no_grad():
        model.stages[0].blocks[0].attn.scale.fill_(50.0)
    halves = torch.cat([torch.full((1, 3, 64, 32), -1.0), torch.full((1, 3, 64, 32), 1.0)], dim=3)
    chosen = model.slot_maps(halves)["stages.0.blocks.0.attn"].argmax(dim=1)[0, 2:-2]  # borders see the padding
    left, right = chosen[:, 2:6], chosen[:, 10:14]
    assert left.unique().numel() == right.unique().numel() == 1
    assert left[0, 0] != right[0, 0]


@pytest.mark.parametrize("learned", [False, True], ids=["pooled", "learned"])
def test_the_shell_of_swin_takes_odd_images_and_trains_every_parameter(learned):
    model = build("glnet_micro", layout="stl", token_head=False, learned_slots=learned)
    maps = model.forward_intermediates(image(33, 47), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(ceil_div(33, s), ceil_div(47, s)) for s in (4, 8, 16)]
    model(image(33, 47)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_an_unknown_way_of_mixing_names_the_known_ones():
    with pytest.raises(ValueError, match=r"\('glmix', 'mha', 'attend'\).*glmix, alternate, attend"):
        build("glnet_micro", mixing=("glmix", "mha", "attend"))
