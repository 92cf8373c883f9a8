"""Mixers by name: any that fits in any host, and a sentence for one that does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vitzoo
from vitzoo.layers import Slot, build_mixer, register_mixer
from vitzoo.layers.mixers import _MIXERS

IMAGE = torch.randn(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", vitzoo.list_mixers())
@pytest.mark.parametrize("host", ["swin_micro", "nat_micro"])
def test_every_mixer_runs_in_every_pyramid_and_learns(host: str, name: str):
    model = vitzoo.create_model(host, num_classes=5, mixer=name)
    model(IMAGE).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert not silent


@pytest.mark.parametrize("name", [n for n in vitzoo.list_mixers() if _MIXERS[n].prefix])
def test_mixers_that_take_prefix_tokens_run_beside_a_class_token(name: str):
    model = vitzoo.create_model("vit_micro", num_classes=5, mixer=name, reg_tokens=2)
    model(IMAGE).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", vitzoo.list_mixers())
def test_every_mixer_runs_in_a_plain_host_without_prefix_tokens(name: str):
    model = vitzoo.create_model("vit_micro", num_classes=5, mixer=name, class_token=False, global_pool="avg")
    assert model(IMAGE).shape == (2, 5)


def test_the_global_mixer_is_the_plain_hosts_own_attention():
    own, named = (vitzoo.create_model("vit_micro", **kwargs).eval() for kwargs in ({}, {"mixer": "global"}))
    named.load_state_dict({k.replace("attn.", "attn.mixer."): v for k, v in own.state_dict().items()})
    assert torch.equal(own(IMAGE), named(IMAGE))


def test_a_choice_for_each_stage_and_for_the_first_blocks():
    model = vitzoo.create_model("swin_micro", mixer=("global", ("grid", 1), None))
    names = [[type(block.attn).__name__ for block in stage.blocks] for stage in model.stages]
    assert names == [["GlobalAttention"] * 2, ["PatternAttention"] * 2, ["PatternAttention"] * 2]
    patterns = [repr(block.attn.pattern) for block in model.stages[1].blocks]
    assert patterns[0].startswith("grid")
    assert patterns[1].startswith("window")


@pytest.mark.parametrize(
    ("host", "kwargs", "sentence"),
    [
        ("nat_micro", {"mixer": "windw"}, "no mixer named 'windw'. Did you mean 'window'"),
        ("nat_micro", {"mixer": ("window",)}, "names 1 stages, the model has 3"),
        ("nat_micro", {"mixer": ("window", 3.5, None)}, "A mixer is a name"),
        ("vit_micro", {"mixer": "window"}, "no place for the model's 1 prefix token"),
    ],
)
def test_a_mixer_that_does_not_fit_says_why(host, kwargs, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        vitzoo.create_model(host, **kwargs)


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(TypeError, match=r"no option 'sise'. It has: size, shift"):
        vitzoo.create_model("swin_micro", mixer="window", mixer_args={"sise": 4})


def test_an_option_may_differ_from_stage_to_stage():
    model = vitzoo.create_model("swin_micro", mixer="neighborhood", mixer_args={"size": (3, 5, 3)})
    assert [stage.blocks[0].attn.pattern.rows.size for stage in model.stages] == [3, 5, 3]


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="There is a mixer 'window' already"):

        @register_mixer("window")
        class Other(nn.Module):
            pass


def test_mixers_keep_shape_dtype_and_odd_maps():
    for name in vitzoo.list_mixers():
        mixer = build_mixer(name, Slot(32, 4, (7, 9)), {})
        assert mixer(torch.randn(2, 5, 11, 32)).shape == (2, 5, 11, 32), name
