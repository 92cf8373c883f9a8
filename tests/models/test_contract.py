"""What every listed model keeps: timm's contract, any image size, the same bits twice.

Runs on the small models of ``tests/models/zoo.py``; ``--models '*'`` runs it on all of them.
"""

from __future__ import annotations

import pickle
import re
from copy import deepcopy
from fnmatch import fnmatch

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import vitzoo
from tests.models.zoo import SMALL, build, image, map_side
from vitzoo import checkpoints

# smallest, narrow, odd, odd and larger than the map of the weights, wide, not a multiple of anything
SIZES = [(32, 32), (33, 47), (224, 37), (37, 224), (97, 64), (250, 330)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def logits_of(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else torch.stack(output).sum(0)


def step(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Output and gradients of one backward pass, with the same drop path every time."""
    torch.manual_seed(4)
    model.zero_grad(set_to_none=True)
    output = logits_of(model(x))
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


def test_every_family_is_in_the_suite():
    assert set(SMALL) == set(vitzoo.list_families())
    assert {name for names in SMALL.values() for name in names} <= set(vitzoo.list_models())


# -- any size, what comes out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_takes_any_image_of_at_least_32_pixels(name, shared_model, size):
    with torch.inference_mode():
        final, maps = shared_model.forward_intermediates(image(*size, batch=1))
        logits = shared_model.forward_head(final)
    assert logits.shape == (1, shared_model.num_classes or shared_model.head_hidden_size)
    assert logits.isfinite().all()
    expected = [
        (1, info["num_chs"], *(map_side(name, side, info["reduction"]) for side in size)) for info in shared_model.feature_info
    ]
    assert [tuple(m.shape) for m in maps] == expected
    assert all(m.isfinite().all() for m in maps)


def test_features_only_equals_forward_intermediates(name, shared_model):
    x = image(70, 93)
    backbone = vitzoo.create_model(name, features_only=True).eval()
    wanted = backbone.model.state_dict()
    backbone.model.load_state_dict({key: shared_model.state_dict()[key] for key in wanted}, strict=True)
    indices = backbone.feature_info.out_indices
    with torch.no_grad():
        maps = backbone(x)
        expected = shared_model.forward_intermediates(x, indices=list(indices), intermediates_only=True)
    assert len(maps) == len(indices) == len(expected)
    for ours, theirs, channels, stride in zip(
        maps, expected, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous()
        assert ours.shape == (2, channels, map_side(name, 70, stride), map_side(name, 93, stride))


def test_intermediates_are_the_same_however_they_are_asked_for(shared_model):
    x = image()
    count = len(shared_model.feature_info)
    with torch.no_grad():
        final, every = shared_model.forward_intermediates(x)
        last = shared_model.forward_intermediates(x, indices=1, intermediates_only=True)
        some = shared_model.forward_intermediates(x, indices=[0, -2], intermediates_only=True)
        early = shared_model.forward_intermediates(x, indices=[0, 1], intermediates_only=True, stop_early=True)
        features = shared_model.forward_features(x)
    assert len(every) == count
    assert torch.equal(final, features)
    assert torch.equal(last[0], every[-1])
    assert [torch.equal(a, b) for a, b in zip(some, (every[0], every[-2]), strict=True)] == [True, True]
    assert [torch.equal(a, b) for a, b in zip(early, every[:2], strict=True)] == [True, True]


def test_channels_last_intermediates_are_not_written_by_later_blocks(shared_model):
    x = image()
    tokens = "NHWC" if hasattr(shared_model, "output_fmt") else "NLC"  # as in timm, only maps have a format
    with torch.inference_mode():
        maps = shared_model.forward_intermediates(x, intermediates_only=True)
        views = shared_model.forward_intermediates(x, intermediates_only=True, output_fmt=tokens)
    for m, view in zip(maps, views, strict=True):
        assert torch.equal(view.reshape(2, -1, m.shape[1]), m.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("layout", ["nchw", "NCWH"])
def test_an_unknown_layout_is_refused(shared_model, layout):
    with pytest.raises(ValueError, match=rf"'NCHW'.*'{layout}'"):
        shared_model.forward_intermediates(image(), output_fmt=layout)


def test_pruned_layers_leave_the_features_as_they_were(model):
    x = image()
    with torch.no_grad():
        before = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        parameters = sum(p.numel() for p in model.parameters())
        assert list(model.prune_intermediate_layers([0, 1], prune_norm=True)) == [0, 1]
        after = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sum(p.numel() for p in model.parameters()) < parameters


def test_forward_is_head_after_features_and_pre_logits_are_what_the_classifier_sees(shared_model):
    x = image()
    with torch.no_grad():
        features = shared_model.forward_features(x)
        assert torch.equal(shared_model.forward_head(features), shared_model(x))
        pre = shared_model.forward_head(features, pre_logits=True)
    assert pre.shape == (2, shared_model.head_hidden_size)


# models that look at the whole batch, why, and what makes them look at each image alone
SEES_BATCH = {
    # as published, the first guess of an inverse follows the largest sum in the batch
    "soft_norm_*": {"batch_statistic": False},
}


def test_an_image_does_not_change_its_neighbours_in_the_batch(name, shared_model):
    alone = next((fields for models, fields in SEES_BATCH.items() if fnmatch(name, models)), None)
    model = shared_model if alone is None else build(name, **alone)
    x = image(65, 50, batch=3)
    with torch.no_grad():
        together = model(x)
        assert_close(model(x[1:2]), together[1:2])


def test_channels_last_and_sliced_images_give_the_same(shared_model):
    x = image(65, 50)
    sliced = torch.zeros(2, 3, 70, 60)[:, :, 2:67, 5:55].copy_(x)
    with torch.no_grad():
        expected = shared_model(x)
        assert_close(shared_model(x.to(memory_format=torch.channels_last)), expected)
        assert_close(shared_model(sliced), expected)


def test_the_input_is_never_written(shared_model):
    x = image()
    kept = x.clone()
    with torch.inference_mode():
        shared_model(x)
    assert torch.equal(x, kept)


# -- gradients and bits -----------------------------------------------------------------------------------------------


# parameters that no output depends on, and why
IDLE = {
    # the classifier reads the class token alone, and these change only patches, in the last block
    "agent_deit_*": r"blocks\.11\.attn\.mixer\.([nhw]a_bias|dwc\.\w+)",
    "flatten_pvt_[tsml]*": r"norm\.\w+",  # published, and passed by
    "flatten_deit_*": r"blocks\.11\.attn\.mixer\.dwc\.\w+",
}

# parameters whose gradient is zero in theory, so that rounding decides what is left of it, and why
ROUNDING = {
    # the same in all keys of a softmax: it moves all scores of a query alike
    "patchconvnet_*": r"head\.attention\.k\.bias",
    "spectformer_h_*": r"head\.attention\.k\.bias",
    # likewise, and the same in all tokens of a softmax over them
    "tap_fan_*": r"head\.attention\.\d\.k\.bias|stages\.\d+\.blocks\.\d+\.mlp\.q\.bias",
    # a constant for all keys of a head
    "crossformer_*": r".*\.attn\.pos\.pos3\.2\.bias",
    "moh_micro": r"stages\.2\..*\.attn\.cpb\.2\.bias",
    "moh_transnext_*": r"stages\.3\..*\.attn\.cpb\.2\.bias",
}


def test_every_parameter_receives_a_gradient(name, model):
    _, gradients = step(model, image(96, 128))
    rounding = next((pattern for models, pattern in ROUNDING.items() if fnmatch(name, models)), "")
    zero = [gradients.pop(key) for key in list(gradients) if re.fullmatch(rounding, key)]
    assert all(g.abs().max() < 1e-6 for g in zero)
    dead = [key for key, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]
    idle = next((pattern for models, pattern in IDLE.items() if fnmatch(name, models)), "")
    assert dead == [key for key in gradients if re.fullmatch(idle, key)]


def test_the_same_step_twice_gives_the_same_bits(model):
    x = image(70, 93)
    (first, grads), (second, again) = step(model.train(), x), step(model, x)
    assert torch.equal(first, second)
    assert [name for name, g in grads.items() if not torch.equal(g, again[name])] == []


def test_gradient_checkpointing_changes_no_bit(model):
    x, twin = image(70, 93), deepcopy(model)
    twin.set_grad_checkpointing(True)
    (plain, grads), (checkpointed, again) = step(model.train(), x), step(twin.train(), x)
    assert torch.equal(plain, checkpointed)
    assert [name for name, g in grads.items() if not torch.equal(g, again[name])] == []
    statistics = dict(twin.named_buffers())
    assert [name for name, value in model.named_buffers() if not torch.equal(value, statistics[name])] == []
    twin.set_grad_checkpointing(False)
    assert not any(getattr(m, "grad_checkpointing", False) for m in twin.modules())


def test_gradient_checkpointing_saves_activations(model):
    x = image(96, 128)

    def kept() -> int:
        saved = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            logits_of(model(x))
        return saved

    plain = kept()
    model.set_grad_checkpointing(True)
    assert kept() < 0.5 * plain


def test_inference_equals_training_forward(shared_model):
    # without gradients a CPU takes a path in place
    x = image(70, 93)
    with_gradients = shared_model(x)
    assert with_gradients.requires_grad
    with torch.no_grad():
        assert_close(shared_model(x), with_gradients.detach())


def test_inference_in_small_chunks_gives_the_same(shared_model, monkeypatch):
    x = image(70, 93, batch=3)
    with torch.no_grad():
        expected = shared_model(x)
        monkeypatch.setattr("vitzoo.layers.blocks.CHUNK_TOKENS", 1)
        assert_close(shared_model(x), expected)


@pytest.mark.parametrize("pyramid", ["nat_micro", "swin_micro", "swinv2_micro"])
def test_the_dense_layout_norms_every_map_and_trains_every_norm(pyramid):
    model = build(pyramid, feature_norm=True, num_classes=0)
    maps = model.forward_intermediates(image(70, 93), intermediates_only=True)
    for m, norm in zip(maps, model.feature_norms, strict=True):
        variance = ((m.permute(0, 2, 3, 1) - norm.bias) / norm.weight).var(-1, unbiased=False)
        assert_close(variance, torch.ones_like(variance), 1e-2)
    sum(m.square().sum() for m in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert_each_parameter_is_grouped_once(model)
    backbone = vitzoo.create_model(pyramid, features_only=True, feature_norm=True)
    assert len(backbone(image())) == len(maps)


def test_drop_path_acts_in_training_only(name):
    model = build(name, drop_path_rate=0.9)
    x = image(batch=8)
    state = deepcopy(model.state_dict())
    torch.manual_seed(0)
    first = logits_of(model.train()(x))
    assert not torch.equal(first, logits_of(model(x)))
    model.eval().load_state_dict(state)  # training moves batch statistics, whether or not paths are dropped
    with torch.no_grad():
        assert torch.equal(model(x), build(name)(x))


# models that choose, why a little matters there, and what leaves nothing to choose
CHOOSE = {
    # of 20 layers and more that each take the best heads for each token, with random weights nearly at random, rounding turns
    # some choices; in half precision such a model is finite, and one that takes all heads is near
    "moh_transnext_small_80": {"routed_heads": (0, 0, 9, 16)},
    "moh_transnext_small_75": {"routed_heads": (0, 0, 9, 20)},
    "moh_transnext_base_75": {"routed_heads": (0, 0, 12, 27)},
    # with the same number of heads everywhere, 38 layers in bfloat16 round 0.11 of the largest logit; 33 do not
    "moh_transnext_base_50": {"routed_heads": (2, 6, 14, 28), "depths": (5, 5, 18, 5)},
}


def without_choices(name: str, model: nn.Module) -> nn.Module:
    return build(name, **CHOOSE[name]) if name in CHOOSE else model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_gives_no_nan_and_nearly_the_same(name, shared_model, dtype):
    x, compared = image(70, 93), without_choices(name, shared_model)
    with torch.no_grad():
        expected = compared(x)
    with torch.autocast("cpu", dtype=dtype):
        assert compared is shared_model or shared_model(x).isfinite().all()
        output = compared(x)
        with torch.no_grad():
            inference = compared(x)
    for result in (output, inference):
        assert result.dtype == (dtype if shared_model.num_classes else torch.float32)
        assert result.isfinite().all()
        assert_close(result.float(), expected, 0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_runs_in_other_precisions(name, model, dtype):
    x, model = image(), without_choices(name, model)
    with torch.no_grad():
        expected = model(x)
        result = model.to(dtype)(x.to(dtype))
    assert result.dtype == dtype
    assert_close(result.float(), expected, 0.1 if dtype == torch.bfloat16 else 1e-4)


# -- surgery ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [7, 0])
def test_reset_classifier(model, classes):
    model.reset_classifier(classes)
    assert model.num_classes == classes
    x = image()
    with torch.no_grad():
        output = model(x)
        pre = model.forward_head(model.forward_features(x), pre_logits=True)
    assert output.shape == (2, classes or model.head_hidden_size)
    if not classes:
        assert torch.equal(output, pre)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert isinstance(head, nn.Linear if classes else nn.Identity)


def test_without_pooling_the_head_passes_what_features_are(model):
    model.reset_classifier(0, "")
    x = image()
    with torch.no_grad():
        assert model(x).shape == model.forward_features(x).shape


def test_no_classes_from_the_start(name):
    model = build(name, num_classes=0)
    with torch.no_grad():
        assert model(image()).shape == (2, model.num_features)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_image_channels(name, channels):
    model = build(name, in_chans=channels)
    with torch.no_grad():
        assert model(image(channels=channels)).isfinite().all()


def test_set_input_size_changes_no_output_at_that_size(model):
    # every size can be fed without it; where positions are learned it resizes them once instead of every time
    x = image(96, 160)
    before = {key: value.shape for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(x)
        model.set_input_size((96, 160))
        assert_close(model(x), expected)
    changed = [key for key, value in model.state_dict().items() if value.shape != before[key]]
    assert all("pos_embed" in key for key in changed)
    assert model.cfg.img_size == (96, 160)


# -- weights ----------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_weights_give_the_same_bits(name, shared_model, tmp_path):
    x = image()
    save_file(shared_model.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"model": shared_model.state_dict()}, tmp_path / "weights.pth")
    with torch.no_grad():
        expected = shared_model(x)
        for file in ("weights.safetensors", "weights.pth"):
            loaded = vitzoo.create_model(name, checkpoint_path=str(tmp_path / file)).eval()
            assert torch.equal(loaded(x), expected)


def test_weights_that_do_not_fit_are_refused_with_names(model, tmp_path):
    state = model.state_dict()
    lost = next(iter(state))
    save_file({f"{key}.of_another" if key == lost else key: value for key, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=re.escape(lost)):
        checkpoints.load(model, tmp_path / "w.safetensors")


def test_nothing_but_parameters_and_batch_statistics_is_stored(shared_model):
    statistics = {
        f"{name}.{key}"
        for name, module in shared_model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert set(shared_model.state_dict()) == {key for key, _ in shared_model.named_parameters()} | statistics
    assert {key for key, _ in shared_model.named_buffers()} == statistics


def test_copies_and_pickles_give_the_same_bits(shared_model):
    x = image()
    with torch.no_grad():
        expected = shared_model(x)
        assert torch.equal(deepcopy(shared_model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(shared_model))(x), expected)


def test_a_model_from_the_meta_device_runs_after_its_weights_are_loaded(name, shared_model):
    with torch.device("meta"):
        model = vitzoo.create_model(name)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    model.init_non_persistent_buffers()
    model.load_state_dict(shared_model.state_dict(), strict=True)
    x = image(70, 93)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), shared_model(x))


# -- optimisers -------------------------------------------------------------------------------------------------------


def assert_each_parameter_is_grouped_once(model: nn.Module) -> None:
    matcher = model.group_matcher()
    blocks = matcher["blocks"]
    patterns = [matcher["stem"], *(p[0] for p in blocks)] if isinstance(blocks, list) else [matcher["stem"], blocks]
    hits = {name: [p for p in patterns if re.match(p, name)] for name, _ in model.named_parameters()}
    assert {name: found for name, found in hits.items() if not found} == {}
    stem = {name: found for name, found in hits.items() if matcher["stem"] in found}
    assert stem
    assert all(len(found) == 1 for found in stem.values())


def test_group_matcher_covers_each_parameter_once(shared_model):
    assert_each_parameter_is_grouped_once(shared_model)


@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_numbered_without_gaps(shared_model, coarse):
    layers = group_parameters(shared_model, shared_model.group_matcher(coarse=coarse))
    names = [name for group in layers.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in shared_model.named_parameters())
    assert sorted(layers) == list(range(len(layers)))


def test_layer_decay_reaches_every_parameter_and_spares_what_takes_no_weight_decay(shared_model):
    groups = param_groups_layer_decay(shared_model, weight_decay=0.05, no_weight_decay_list=shared_model.no_weight_decay())
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(shared_model.named_parameters())
    assert set(decay) == {id(p) for p in named.values()}
    spared = shared_model.no_weight_decay()
    assert spared <= set(named)
    assert {name for name in named if re.search(r"pos_embed|_token|rel_bias|logit_scale|cpb_mlp", name)} <= spared
    assert all(decay[id(named[name])] == 0 for name in spared)
    assert any(value > 0 for value in decay.values())


# -- names ------------------------------------------------------------------------------------------------------------


def test_timm_creates_it_after_importing_vitzoo(name, shared_model):
    registered = vitzoo.model_info(name).timm_name
    model = timm.create_model(registered)
    assert type(model) is type(shared_model)
    assert model.pretrained_cfg["architecture"] == registered
    modules = dict(model.named_modules())
    assert isinstance(modules[model.pretrained_cfg["first_conv"]], nn.Conv2d)
    heads = model.pretrained_cfg["classifier"]
    kind = nn.Linear if model.num_classes else nn.Identity
    assert all(isinstance(modules[head], kind) for head in ([heads] if isinstance(heads, str) else heads))


def test_an_unknown_keyword_names_the_nearest(name):
    with pytest.raises(TypeError, match=r"'drop_path_rates'.*'drop_path_rate'"):
        vitzoo.create_model(name, drop_path_rates=0.1)


def test_a_dilated_backbone_is_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match="output_stride"):
        vitzoo.create_model(name, features_only=True, output_stride=16)
