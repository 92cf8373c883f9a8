"""MaxViT beyond the contract: both paddings, norms inside convolutions, windows of another size, torchvision's flavor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models.maxvit import MaxVit

import vitzoo
from tests.models.test_contract import SIZES, assert_close, step
from tests.models.zoo import build, ceil_div, image
from vitzoo import checkpoints
from vitzoo.models import maxvit


@pytest.fixture(scope="module", params=["tf", "tv"])
def flavored(request) -> nn.Module:
    return build("maxvit_micro", flavor=request.param)


@pytest.mark.parametrize("n", [5, 6, 7, 8])
def test_same_padding_is_tensorflows(n):
    x, weight = torch.randn(1, 1, n, 9), torch.randn(1, 1, 3, 3)
    total = max((ceil_div(n, 2) - 1) * 2 + 3 - n, 0)  # tf.nn: "SAME" padding along one axis
    expected = F.conv2d(F.pad(x, (1, 1, total // 2, total - total // 2)), weight, stride=2)
    assert torch.equal(F.conv2d(maxvit.pad_same(x), weight, stride=2), expected)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (5, 1)])
def test_a_cell_at_the_border_is_averaged_over_what_it_has(size, traced, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    x = torch.randn(2, 3, *size)
    cells = [[x[:, :, y : y + 2, u : u + 2].mean((2, 3)) for u in range(0, size[1], 2)] for y in range(0, size[0], 2)]
    expected = torch.stack([torch.stack(row, -1) for row in cells], -2)
    torch.testing.assert_close(maxvit.mean_of_cells(x), expected)


def test_norms_inside_convolutions_change_nothing_but_rounding(flavored, monkeypatch):
    x = image(70, 93)
    with torch.no_grad():
        folded = flavored(x)
        monkeypatch.setattr(maxvit, "may_fold", lambda *args: False)
        plain = flavored(x)
    assert not torch.equal(folded, plain)
    assert_close(folded, plain)


def test_a_hook_inside_the_bottleneck_sees_its_map():
    model, seen = build("maxvit_micro"), []
    model.stages[1].blocks[0].conv.norm1.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad():
        model(image(64, 96))
    assert seen == [(2, 128, 16, 24)]  # before the stride


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_both_flavors_take_any_image(flavored, size):
    with torch.inference_mode():
        maps = flavored.forward_intermediates(image(*size, batch=1), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(ceil_div(size[0], s), ceil_div(size[1], s)) for s in (4, 8, 16)]


@pytest.mark.timeout(120)
def test_torchvisions_flavor_exports_with_dynamic_batch_height_and_width():
    model = build("maxvit_micro", flavor="tv", depths=(1, 1), num_heads=(1, 2))
    shapes = {axis: torch.export.Dim(name, min=low, max=2048) for axis, name, low in ((0, "b", 1), (2, "h", 33), (3, "w", 33))}
    exported = torch.export.export(model, (image(270, 350),), dynamic_shapes=(shapes,), strict=False).module()
    for size in ((33, 47), (97, 250)):
        with torch.no_grad():
            assert_close(exported(image(*size)), model(image(*size)))


def test_torchvisions_weights_give_torchvisions_numbers():
    torch.manual_seed(6)
    sizes = dict(stem_channels=8, block_channels=[8, 16, 24], block_layers=[1, 2, 1], mlp_ratio=2, expansion_ratio=2)
    theirs = MaxVit((64, 64), partition_size=2, head_dim=8, stochastic_depth_prob=0.0, num_classes=10, **sizes).eval()
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_(std=0.3)
    ours = maxvit.MaxViT(
        stem_width=8, embed_dim=(8, 16, 24), depths=(1, 2, 1), num_heads=(1, 2, 3), window_size=2, mlp_ratio=2,
        expand_ratio=2, num_classes=10, flavor="tv",
    ).eval()  # fmt: skip
    ours.load_state_dict(checkpoints.convert(theirs.state_dict(), ours), strict=True)
    x = image(64, 64)
    logits, gradients = step(ours, x)
    expected, published = step(theirs, x)
    assert_close(logits, expected)
    with torch.no_grad():
        assert_close(ours(x), expected)
    for name, value in checkpoints.convert({name: g for name, g in published.items() if g is not None}, ours).items():
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=2e-4 * value.abs().max().item(), msg=name)


def test_a_backbone_trains_all_that_it_keeps():
    backbone = vitzoo.create_model("maxvit_micro", features_only=True)
    sum(m.square().sum() for m in backbone(image())).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_torchvisions_last_layer_has_no_bias_and_gets_none():
    model = build("maxvit_micro", flavor="tv", num_classes=10)
    assert model.get_classifier().bias is None
    model.reset_classifier(7, "max")
    assert model.get_classifier().bias is None
    assert model(image()).shape == (2, 7)


def test_windows_may_be_oblong_and_change():
    model = build("maxvit_micro", window_size=(2, 3))
    half = model.stages[0].blocks[1].attn_grid.attn
    assert half.rel_bias.shape == (1, 3, 5)
    with torch.no_grad():
        assert model(image(64, 96)).isfinite().all()
    model.set_input_size((64, 64), window_size=4)
    assert half.rel_bias.shape == (1, 7, 7)
    assert model.cfg.window_size == 4
    _, gradients = step(model, image(64, 64))
    assert all(g is not None for g in gradients.values())


def test_weights_of_another_window_are_resized(tmp_path):
    save_file(build("maxvit_micro").state_dict(), tmp_path / "weights.safetensors")
    model = vitzoo.create_model("maxvit_micro", window_size=3, checkpoint_path=str(tmp_path / "weights.safetensors"))
    assert model.stages[2].blocks[0].attn_block.attn.rel_bias.shape == (4, 5, 5)


def test_an_unknown_flavor_is_refused():
    with pytest.raises(ValueError, match="'tf' or 'tv', got 'jax'"):
        vitzoo.create_model("maxvit_micro", flavor="jax")


def test_weights_are_timms_with_what_is_published_of_them():
    cfg = vitzoo.create_model("maxvit_tiny_tf_384", depths=(1, 1, 1, 1)).pretrained_cfg
    assert (cfg["mean"], cfg["crop_pct"], cfg["hf_hub_id"]) == ((0.5, 0.5, 0.5), 1.0, "timm/maxvit_tiny_tf_384.in1k")
    assert cfg["license"] == "Apache-2.0 (repository licence)"
    assert "fixed_input_size" not in cfg or not cfg["fixed_input_size"]
    assert "maxvit_xlarge_tf_224.in21k" in vitzoo.list_models("maxvit_xlarge*", pretrained=True)
    assert vitzoo.list_models("maxvit_t_tv", pretrained=True) == ["maxvit_t_tv"]
