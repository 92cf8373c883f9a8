"""Explanations against what they stand for: gradients of a model made linear, written-out formulas, another algorithm."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor, nn

import vitzoo
from tests.models.zoo import build
from vitzoo import explain
from vitzoo.explain import rolling
from vitzoo.layers import PatternAttention


def image(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return build("vit_micro", patch_size=8, num_classes=7)  # 4 x 5 patches of 32 x 40 pixels, and a class token


@pytest.fixture(scope="module")
def pyramids() -> dict[str, nn.Module]:
    names = ("swin_micro", "nat_micro", "pvt_micro", "agent_micro", "biformer_micro")
    models = {name: build(name, num_classes=7) for name in names}
    for model in models.values():
        model.head.fc.weight.data.mul_(1000)  # so that gradients outweigh what relevance starts with
    return models


# -- attention maps -----------------------------------------------------------------------------------------------------


def test_the_calls_are_listed_in_the_order_in_which_they_run(vit, pyramids):
    assert explain.list_attentions(vit, image(32, 40)) == [(f"blocks.{i}.attn", "attend") for i in range(4)]
    agents = explain.list_attentions(pyramids["agent_micro"], image(32, 32))
    assert agents[:2] == [("stages.0.blocks.0.attn", "attend")] * 2  # gather, hand out
    assert agents[-1] == ("stages.2.blocks.1.attn", "attend2d")


def test_a_window_sees_itself_and_a_neighborhood_its_kernel(pyramids):
    for name, layer, (height, width) in (("swin_micro", 1, (16, 16)), ("nat_micro", 0, (11, 13))):
        model = pyramids[name]
        side = 2 if name == "swin_micro" else 4
        weights = explain.attention_maps(model, image(side * height, side * width), layer)
        attentions = [m for m in model.modules() if isinstance(m, PatternAttention)]
        pattern = attentions[layer].pattern
        for y, x in ((0, 0), (height // 2, width - 1)):
            rows, cols = pattern.keys(y, x, height, width)
            seen = torch.zeros(height, width, dtype=torch.bool)
            seen[np.ix_(list(rows), list(cols))] = True
            assert torch.equal(weights[0, 0, y * width + x].view(height, width) > 0, seen), name
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_attention_maps_are_what_the_ops_compute_with(vit):
    kept: list[Tensor] = []
    handle = vit.blocks[2].attn.qkv.register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    weights = explain.attention_maps(vit, image(32, 40), "blocks.2.attn", head=1)
    handle.remove()
    q, k, _ = kept[0].unflatten(-1, (3, 2, 32)).unbind(-3)
    torch.testing.assert_close(weights, (q[:, :, 1] @ k[:, :, 1].mT * 32**-0.5).softmax(-1))


def test_the_heat_of_a_layer_is_the_row_of_the_class_token_or_the_mean_of_the_map(vit, pyramids):
    x = image(32, 40)
    rows = explain.attention_maps(vit, x, 1, head=0)
    torch.testing.assert_close(explain.attention_heat(vit, x, 1, head=0), rows[:, 0, 1:].view(1, 4, 5))
    nat, x = pyramids["nat_micro"], image(44, 52)
    columns = explain.attention_maps(nat, x, 0).mean(1).mean(1)
    torch.testing.assert_close(explain.attention_heat(nat, x, 0), columns.view(1, 11, 13))


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda model, x: explain.attention_maps(model, x, 4), "attends 4 times, there is no layer 4"),
        (lambda model, x: explain.attention_maps(model, x, "blocks.9"), "It is from: blocks.0.attn"),
        (lambda model, x: explain.attention_maps(model, x, 0, head=2), "has 2 heads, there is no head 2"),
        (lambda model, x: explain.attention_heat(model, x, 4), "attends in 4 layers, there is no layer 4"),
        (lambda model, x: explain.attention_heat(model, x, 0, head=-3), "has 2 heads, there is no head -3"),
        (lambda model, x: explain.rollout(model, x, start=4), "start 4 leaves no layer"),
        (lambda model, x: explain.rollout(model, x, fusion="sum"), "fusion is mean, max, min, got 'sum'"),
        (lambda model, x: explain.relevance(model, x, 7), "target is one of 7 classes for each of 1 images, got 7"),
        (lambda model, x: explain.gradcam(model, x, layers="blocks.3.norm9"), "has no layer 'blocks.3.norm9'"),
        (lambda model, x: explain.sampling_points(model, x), "has no deformable attention"),
        (lambda model, x: explain.agent_maps(model, x), "has no agents"),
        (lambda model, x: explain.slot_maps(model, x), "has no slots"),
        (lambda model, x: explain.rollout(timm.create_model("test_resnet"), x), r"after vitzoo\.accelerate\(model\)"),
    ],
)
def test_what_is_not_there_is_said(vit, ask, said):
    with pytest.raises(ValueError, match=said) as raised:
        ask(vit, image(32, 40))
    assert "\n" not in str(raised.value)


# -- rollout ------------------------------------------------------------------------------------------------------------


def made_linear(name: str) -> nn.Module:
    """A pyramid whose channel 0 only moves along attention and merging: values, projections and norms do nothing, and the
    weights are those of random bias tables, equal for all heads."""
    model = build(name)
    with torch.no_grad():
        for module in model.modules():
            for norm in ("norm", "norm1", "norm2"):
                if isinstance(getattr(module, norm, None), nn.LayerNorm):
                    setattr(module, norm, nn.Identity())
            if hasattr(module, "mlp"):
                module.mlp.fc2.weight.zero_()
                module.mlp.fc2.bias.zero_()
            if isinstance(module, PatternAttention):
                dim = module.proj.weight.shape[0]
                module.qkv.weight.zero_()[2 * dim :] = torch.eye(dim)
                module.proj.weight.copy_(torch.eye(dim))
                module.qkv.bias.zero_()
                module.proj.bias.zero_()
                module.rel_bias.copy_(torch.randn_like(module.rel_bias[:1]).expand_as(module.rel_bias))
            if hasattr(module, "reduction"):
                weight = module.reduction.weight.zero_()
                if weight.ndim == 2:
                    weight[0].view(4, -1)[:, 0] = 0.25
                else:
                    weight[0, 0, 1:, 1:] = 0.25
    return model


@pytest.mark.parametrize(("name", "height", "width"), [("swin_micro", 32, 64), ("nat_micro", 48, 64)])
def test_rollout_is_the_gradient_of_a_model_that_only_attends(name, height, width):
    model, x, kept = made_linear(name), image(height, width), []
    handle = model.stem.register_forward_hook(lambda module, args, out: kept.append(out))
    features = model.forward_features(x)
    handle.remove()
    (gradient,) = torch.autograd.grad(features[:, 0].mean(), kept)
    layers = len(explain.list_attentions(model, x))
    torch.testing.assert_close(explain.rollout(model, x), gradient[..., 0] / 2**layers, atol=1e-6, rtol=1e-3)


def test_rollout_of_a_vit_is_the_published_product(vit):
    x = image(32, 40, batch=2)
    product = torch.eye(21).expand(2, -1, -1)
    for i in range(4):
        weights = explain.attention_maps(vit, x, i)
        product = (0.5 * weights.mean(1) + 0.5 * torch.eye(21)) @ product
    torch.testing.assert_close(explain.rollout(vit, x), product[:, 0, 1:].view(2, 4, 5))
    strongest = explain.rollout(vit, x, start=3, fusion="max", discard=0.9)
    kept = explain.attention_maps(vit, x, 3).amax(1)[:, 0, 1:].view(2, 4, 5)
    assert ((strongest > 0) <= (kept >= strongest)).all()
    assert (strongest == 0).any()


@pytest.mark.parametrize("name", ["swin_micro", "nat_micro", "pvt_micro", "agent_micro", "biformer_micro"])
def test_what_a_pyramid_rolls_out_to_lies_on_its_first_map_and_sums_to_one(pyramids, name):
    heat = explain.rollout(pyramids[name], image(45, 59))
    grid = {"swin_micro": (23, 30), "nat_micro": (12, 15), "agent_micro": (23, 30)}.get(name)
    assert grid is None or heat.shape[1:] == grid
    assert (heat >= 0).all()
    if name != "pvt_micro":  # its cells leave out what does not fill one
        torch.testing.assert_close(heat.sum(), torch.tensor(1.0))
    assert heat.std() > 0


def test_reduced_keys_and_agents_stand_for_the_tokens_that_they_sum_up(pyramids):
    for name in ("pvt_micro", "agent_micro"):
        model = build(name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if ".attn." in key and not key.endswith("sr.norm.weight"):
                    parameter.zero_()  # everybody takes the same of all, and so it goes to the image
        heat = explain.rollout(model, image(64, 64))
        torch.testing.assert_close(heat, torch.full_like(heat, 1 / heat[0].numel()))


def test_a_token_that_no_cell_of_reduced_keys_holds_counts_through_the_residual_only():
    model = build("pvt_micro", embed_dim=(16,), depths=(1,), num_heads=(1,), sr_ratios=(2,), mlp_ratio=(2,))
    heat = explain.rollout(model, image(20, 20))[0]  # 5 x 5 tokens, keys of 2 x 2 cells of 2 x 2
    torch.testing.assert_close(heat[4], torch.full((5,), 0.5 / 25))
    torch.testing.assert_close(heat[:, 4], torch.full((5,), 0.5 / 25))
    assert (heat[:4, :4] > 0.5 / 25).all()


# -- flow ---------------------------------------------------------------------------------------------------------------


def test_flow_is_the_largest_flow_that_another_algorithm_finds():
    draw = torch.Generator().manual_seed(5)
    layers = rolling.augmented(torch.rand(3, 5, 5, generator=draw).pow(4))
    units = (layers * 2**20).round().int()
    edges = np.zeros((20, 20), dtype=np.int32)  # 4 levels of 5 tokens, the output first
    for level, layer in enumerate(units.flip(0)):
        edges[5 * level : 5 * level + 5, 5 * level + 5 : 5 * level + 10] = layer.numpy()
    for output, source in ((0, 0), (1, 4), (3, 2)):
        expected = maximum_flow(csr_matrix(edges), output, 15 + source).flow_value
        assert rolling.max_flow(units.double(), output, source) == pytest.approx(expected)


def test_flow_of_a_model_is_that_of_its_layers_and_too_many_tokens_are_refused(vit):
    x = image(16, 24)
    layers = torch.stack([rolling.augmented(explain.attention_maps(vit, x, i)[0].mean(0)) for i in range(4)])
    row = rolling.flows(layers, [0])[0]
    torch.testing.assert_close(explain.flow(vit, x), (row / row.sum())[1:].view(1, 2, 3))
    with pytest.raises(ValueError, match="21 tokens make"):
        explain.flow(vit, image(32, 40), most_tokens=20)
    with pytest.raises(ValueError, match=r"Take rollout\."):
        explain.flow(build("nat_micro"), image(32, 32))


# -- relevance and Grad-CAM ---------------------------------------------------------------------------------------------


def test_relevance_of_a_vit_is_chefers_product(vit, monkeypatch):
    kept: list[Tensor] = []

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("blnd,bsnd->bnls", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        kept.append(weights)
        return torch.einsum("bnls,bsnd->blnd", weights, v)

    x = image(32, 40)
    found = explain.relevance(vit, x, 5)
    monkeypatch.setattr("vitzoo.layers.attention.attend", written_out)
    gradients = torch.autograd.grad(vit(x)[0, 5], kept)
    product = torch.eye(21)
    for weights, gradient in zip(kept, gradients, strict=True):
        product = product + (weights[0] * gradient[0]).clamp(min=0).mean(0) @ product
    torch.testing.assert_close(found, product[0, 1:].view(1, 4, 5).detach())


@pytest.mark.parametrize("name", ["swin_micro", "nat_micro", "pvt_micro", "agent_micro", "biformer_micro"])
def test_relevance_of_a_pyramid_is_for_its_image_and_its_class(pyramids, name):
    model, x = pyramids[name], image(45, 59, batch=2)
    both = explain.relevance(model, x, torch.tensor([1, 6]))
    torch.testing.assert_close(both[1:], explain.relevance(model, x[1:], 6), rtol=1e-3, atol=1e-6)
    assert not torch.allclose(both[1:], explain.relevance(model, x[1:], 2), rtol=1e-2)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_relevance_of_a_class_that_nothing_speaks_for_is_that_of_the_output_alone(pyramids):
    model = build("swin_micro", num_classes=7)
    with torch.no_grad():
        model.head.fc.weight[3].zero_()
    heat = explain.relevance(model, image(32, 32), 3)
    torch.testing.assert_close(heat, torch.full_like(heat, 1 / heat[0].numel()))


def test_gradcam_of_a_mean_is_its_class_weights_times_the_map():
    # in channels first, which a layer without parameters does not say itself
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    ).eval()
    x = image(9, 11, batch=2)
    with torch.no_grad():
        cam = torch.einsum("bchw,c->bhw", model[:2](x), model[4].weight[2]).clamp(min=0)
    cam -= cam.amin((1, 2), keepdim=True)
    found = explain.gradcam(model, x, 2, layers="1")
    torch.testing.assert_close(found, cam / (cam.amax((1, 2), keepdim=True) + 1e-7 * 99), atol=1e-4, rtol=1e-3)
    both = explain.gradcam(model, x, 2, layers=["1", "0"])
    assert both.shape == found.shape
    assert not torch.allclose(both, found)


@pytest.mark.parametrize(
    ("name", "grid"),
    [("swin_micro", (6, 8)), ("nat_micro", (3, 4)), ("pvt_micro", None), ("vit", (6, 8)), ("test_resnet", None)],
)
def test_gradcam_looks_at_the_last_block_of_any_model(name, grid, vit, pyramids):
    model = vit if name == "vit" else pyramids[name] if name in pyramids else timm.create_model(name).eval()
    heat = explain.gradcam(model, image(45, 59), 1)
    assert grid is None or heat.shape == (1, *grid)
    assert heat.min() == 0
    assert heat.max() == pytest.approx(1, abs=1e-2)


# -- points, agents, slots ----------------------------------------------------------------------------------------------


def test_points_that_no_offset_moves_are_the_reference_grid():
    model = build("dat_micro")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".offset" in key:
                parameter.zero_()
    points = explain.sampling_points(model, image(48, 64))
    assert len(points) == 2
    for found in points.values():
        assert torch.equal(found, found[:, :, :, :1].expand_as(found))  # the groups agree
        assert (found.diff(dim=1)[..., 0] > 0).all()
        assert (found.diff(dim=2)[..., 1] > 0).all()
    moved = explain.sampling_points(build("dat_micro"), image(48, 64))
    assert any(not torch.equal(moved[key], points[key]) for key in points)


def test_an_agent_gathers_a_whole_map_and_slots_share_a_token_out(pyramids):
    maps = explain.agent_maps(pyramids["agent_micro"], image(45, 59))
    assert {tuple(m.shape[2:]) for m in maps.values()} == {(9, 23, 30), (16, 12, 15)}
    for found in maps.values():
        torch.testing.assert_close(found.sum((-2, -1)), torch.ones_like(found[..., 0, 0]))
        assert found.std() > 0
    slots = explain.slot_maps(build("glnet_micro"), image(45, 59))
    assert slots
    for found in slots.values():
        torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))


# -- pictures -----------------------------------------------------------------------------------------------------------


def test_a_drawn_map_is_bright_where_it_is_large_and_points_lie_where_they_are(tmp_path):
    grey, heat = torch.zeros(3, 40, 80), torch.zeros(4, 8)
    heat[3, 7] = 1
    drawn = np.asarray(explain.draw(grey, heat, path=tmp_path / "heat.png", strength=1.0)).astype(int).sum(-1)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "heat.png")).astype(int).sum(-1), drawn)
    assert drawn.shape == (40, 80)
    assert drawn[-1, -1] == drawn.max() > drawn[0, 0] == drawn.min()
    plain = explain.draw(grey)
    assert np.ptp(np.asarray(plain)[..., 0]) == 0  # normalised grey is grey again
    pointed = np.asarray(explain.draw(grey, points=torch.tensor([[-1.0, 1.0]]))) != np.asarray(plain)
    rows, cols = np.nonzero(pointed.any(-1))
    assert rows.max() < 5
    assert cols.min() > 74
    for wrong in (lambda: explain.draw(grey[None].expand(2, -1, -1, -1)), lambda: explain.draw(grey, heat.expand(2, -1, -1))):
        with pytest.raises(ValueError, match="one by one"):
            wrong()


def test_a_model_of_timms_is_explained_after_accelerate():
    torch.manual_seed(0)
    theirs = timm.create_model("test_vit").eval()
    model, x = vitzoo.accelerate(theirs), image(160, 160)
    heat = explain.rollout(model, x)
    assert heat.shape == (1, 10, 10)
    torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-4)
    assert F.cosine_similarity(heat.flatten(), torch.ones(100), dim=0) < 1
