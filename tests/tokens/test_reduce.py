"""Putting token reduction into models and taking it out again, ours and timm's, with every kind of prefix and norm."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import vitzoo
from tests.tokens.conftest import HOSTS, TINY, host, image
from vitzoo import tokens
from vitzoo.tokens import METHODS, Method

NEEDS_CLASS = {name for name, method in METHODS.items() if method.NEEDS_CLASS}
WITHOUT_CLASS = ("ours, no prefix", "siglip")

OFF = {
    "tome": {"r": 0},
    "evit": {"keep_rate": 1.0},
    "dynamicvit": {"keep_rate": 1.0},
    "tps": {"keep_rate": 1.0},
    "ats": {"layers": ()},
    "tap": {"scales": 1},
    "sparsifiner": {"attn_keep_rate": 1.0},
    "skipvit": {"keep_rate": 1.0},
    "spa": {"keep_rate": 1.0},
    "mstm": {"keep_rate": 1.0},
}
ON = {
    "tome": {"r": 9},
    "evit": {"keep_rate": 0.5},
    "dynamicvit": {"keep_rate": 0.6},
    "tps": {"keep_rate": 0.6},
    "ats": {"pack": False},
    "tap": {"scales": 3},
    "sparsifiner": {"attn_keep_rate": 0.3, "reduce_n": 8},
    "skipvit": {"keep_rate": 0.4},
    "spa": {"keep_rate": 0.5},
    "mstm": {"keep_rate": 0.6, "multi_scale": True},
}
LEARNED = {
    "dynamicvit": "score_predictor",
    "tps": "score_predictor",
    "tap": "dilation_predictor",
    "sparsifiner": "mask_predictor",
    "spa": "gate",
    "mstm": "scale_fusion",
}
"""Methods with parameters of their own, and what these are called in a state_dict."""


class TakenApart(Method):
    """Divides every block and changes nothing."""

    def divides(self, step, state):
        return True


def suits(name: str, method: str) -> bool:
    return not ((name in WITHOUT_CLASS and method in NEEDS_CLASS) or (name == "eva02" and method == "spa"))


def reduced(name: str, method: str, **changes: object) -> nn.Module:
    torch.manual_seed(3)
    return tokens.reduce(host(name, **changes), method, **ON[method]).eval()


def test_every_method_is_tested():
    assert set(OFF) == set(ON) == set(METHODS)


@pytest.mark.parametrize("name", HOSTS)
def test_a_block_taken_apart_computes_what_it_computed(name):
    model, x = host(name), image()
    with torch.no_grad():
        expected = model(x)
        tokens.reduce(model, TakenApart())
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_to_reduce_is_the_model_to_the_bit(name):
    model, x = host(name), image()
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        for method, options in OFF.items():
            if not suits(name, method):
                continue
            tokens.reduce(model, method, **options)
            assert torch.equal(model(x), expected), method
            added = [key for key in model.state_dict() if key not in names]
            assert all(LEARNED[method] in key for key in added), added
            tokens.restore(model)
            assert list(model.state_dict()) == names
            assert torch.equal(model(x), expected), method


@pytest.mark.parametrize("method", ON)
@pytest.mark.parametrize("name", HOSTS)
def test_every_host_takes_every_method_or_says_why_not(name, method):
    if not suits(name, method):
        with pytest.raises(ValueError, match=r"this model has no class token|its positions are rotary"):
            reduced(name, method)
        return
    model, x = reduced(name, method), image()
    with torch.no_grad():
        features = model.forward_features(x)
        logits, again = model(x), model(x)
        final, maps = model.forward_intermediates(x)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    assert torch.equal(logits, again)
    assert torch.equal(final, features)
    assert features.shape[1] <= 64 + model.num_prefix_tokens
    assert [tuple(m.shape) for m in maps] == [(2, 48, 8, 8)] * 4
    assert all(m.isfinite().all() for m in maps)


def test_a_pyramid_says_why_it_cannot_be_reduced():
    with pytest.raises(ValueError, match="Swin cannot be reduced by 'tome': its windows and downsampling need the whole map"):
        tokens.reduce(vitzoo.create_model("swin_micro"), "tome")


@pytest.mark.parametrize("block", ["ParallelScalingBlock", "ParallelThingsBlock"])
def test_a_block_of_another_shape_says_why_it_cannot_be_reduced(block):
    model = timm.models.VisionTransformer(**TINY, block_fn=getattr(timm.models.vision_transformer, block))
    with pytest.raises(ValueError, match=f"a {block} does not run attention and MLP one after the other"):
        tokens.reduce(model, "tome")


def test_another_attention_says_why_it_cannot_be_reduced():
    model = timm.models.VisionTransformer(**{**TINY, "num_heads": 2}, attn_layer="diff")
    with pytest.raises(ValueError, match="the attention DiffAttention is not one that is known here"):
        tokens.reduce(model, "tome")


def test_reducing_twice_and_unknown_methods_are_refused():
    model = reduced("ours", "tome")
    with pytest.raises(ValueError, match="reduced already"):
        tokens.reduce(model, "tome")
    with pytest.raises(ValueError, match=r"no token reduction 'tomee'\. There are: ats"):
        tokens.reduce(host("ours"), "tomee")
    with pytest.raises(TypeError, match="rr"):
        tokens.reduce(host("ours"), "tome", rr=3)
    with pytest.raises(ValueError, match="takes no attention mask"):
        model.blocks[0](torch.zeros(1, 5, 48), attn_mask=torch.zeros(5, 5))


@pytest.mark.parametrize("name", ["ours", "deit", "eva02"])
def test_copies_and_pickles_are_models_of_their_own(name):
    model, x = reduced(name, "evit"), image()
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
            next(other.blocks.parameters()).add_(1.0)
            assert torch.equal(model(x), expected)
            assert not torch.equal(other(x), expected)
            tokens.restore(other)
            assert other.forward_features(x).shape[1] == 65


@pytest.mark.parametrize("name", ["ours", "deit"])
def test_features_only_gives_whole_maps(name):
    model_name, kwargs = HOSTS[name]
    build = timm.create_model if model_name.startswith("timm:") else vitzoo.create_model
    features = build(model_name.removeprefix("timm:"), features_only=True, out_indices=(1, 3), **kwargs).eval()
    tokens.reduce(features, "tome", r=9)
    whole = tokens.backbone_of(features)
    with torch.no_grad():
        maps = features(image())
        expected = whole.forward_intermediates(image(), indices=[1, 3], intermediates_only=True)
    assert [torch.equal(a, b) for a, b in zip(maps, expected, strict=True)] == [True, True]
    assert whole.forward_features(image()).shape[1] == 29


def test_pruning_layers_makes_another_block_the_last():
    model = reduced("deit", "tome")
    model.prune_intermediate_layers([1])
    with torch.no_grad():
        assert model.forward_features(image()).shape == (2, 47, 48)


def test_a_patch_that_was_dropped_keeps_its_last_value():
    model, x = reduced("ours", "evit"), image()
    source = tokens.follow(model, x)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    for block in range(1, 4):
        dropped = (source[block] < 0)[:, 1:].unflatten(1, (8, 8))
        before = (source[block - 1] < 0)[:, 1:].unflatten(1, (8, 8))
        assert dropped.any()
        gone = (dropped & before)[:, None].expand_as(maps[block])
        assert torch.equal(maps[block][gone], maps[block - 1][gone])


@pytest.mark.parametrize("method", ON)
def test_gradient_checkpointing_gives_the_same_gradients(method):
    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = reduced("ours", method).train()
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(0)
        model(image()).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)
