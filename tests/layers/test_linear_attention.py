"""Focused linear attention and attention among channels, as mixers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim

import vitzoo
from vitzoo.layers import ChannelAttention, FocusedLinearAttention, MixedAttention, OnTokens, Slot
from vitzoo.layers.linear_attention import SharedDepthwiseConv, focus, stretch_tokens


def off_their_start(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


# -- the feature map --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("power", [1, 3, 2.5])
def test_focusing_keeps_lengths_and_is_the_papers_formula(power, gradients):
    t, sharpness = torch.randn(2, 7, 12, dtype=torch.float64), torch.rand(1, 1, 12, dtype=torch.float64) + 0.5
    u = (t.relu() + 1e-6) / sharpness
    kept = t.clone()
    with torch.set_grad_enabled(gradients):
        phi = focus(t, sharpness, power)
    torch.testing.assert_close(phi, u**power * u.norm(dim=-1, keepdim=True) / (u**power).norm(dim=-1, keepdim=True))
    torch.testing.assert_close(phi.norm(dim=-1), u.norm(dim=-1))
    assert torch.equal(t, kept)


def test_its_gradients_are_those_of_finite_differences():
    t = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    sharpness = torch.rand(1, 1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t, s: focus(t, s + 0.5, 3), (t, sharpness))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("power", [3, 4, 8])
def test_a_token_without_a_positive_channel_is_finite_and_so_is_its_gradient(power, dtype):
    t = (-torch.rand(2, 5, 16)).to(dtype).requires_grad_()
    sharpness = torch.full((1, 1, 16), 0.7, requires_grad=True)
    phi = focus(t, sharpness, power)
    phi.sum().backward()
    assert phi.dtype == torch.float32
    torch.testing.assert_close(phi, torch.full_like(phi, 1e-6 / 0.7))
    assert t.grad.isfinite().all()
    assert sharpness.grad.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(focus(t, sharpness, power), phi)


# -- focused linear attention -----------------------------------------------------------------------------------------


def test_heads_share_the_kernels_of_the_depthwise_convolution():
    conv, x = SharedDepthwiseConv(4, 5, num_heads=3), torch.randn(2, 6, 7, 12)
    heads = x.permute(0, 3, 1, 2).reshape(6, 4, 6, 7)
    alone = F.conv2d(heads, conv.weight, conv.bias, padding=2, groups=4).reshape(2, 12, 6, 7).permute(0, 2, 3, 1)
    assert conv.weight.shape == (4, 1, 5, 5)
    torch.testing.assert_close(conv(x), alone)


def test_a_class_token_is_a_query_and_a_key_without_position_or_convolution():
    slot = Slot(12, 3, (4, 5), prefix_tokens=1)
    mixer = off_their_start(FocusedLinearAttention(slot))
    x = torch.randn(2, 21, 12)
    q, k, v = mixer.qkv(x).chunk(3, -1)
    k = torch.cat([k[:, :1], k[:, 1:] + mixer.positional_encoding], 1)
    q, k = (focus(t, F.softplus(mixer.scale), 3).unflatten(-1, (3, 4)).transpose(1, 2) for t in (q, k))
    weights = q @ k.transpose(-2, -1)
    out = (weights @ v.unflatten(-1, (3, 4)).transpose(1, 2)) / (weights.sum(-1, keepdim=True) + 21e-6)
    out = out.transpose(1, 2).flatten(2)
    out[:, 1:] += mixer.dwc(v[:, 1:].unflatten(1, (4, 5))).flatten(1, 2)
    torch.testing.assert_close(mixer.forward_tokens(x, 4, 5), mixer.proj(out))


def test_without_prefix_tokens_a_map_and_its_tokens_are_the_same():
    mixer, x = off_their_start(FocusedLinearAttention(Slot(12, 3, (4, 5)))), torch.randn(2, 4, 5, 12)
    assert torch.equal(OnTokens(mixer, 0)(x.flatten(1, 2), 4, 5), mixer(x).flatten(1, 2))
    torch.testing.assert_close(mixer.forward_tokens(x.flatten(1, 2), 4, 5), mixer(x).flatten(1, 2))


@pytest.mark.parametrize("size", [(4, 5), (1, 1), (7, 3), (16, 20)])
def test_positions_follow_the_map(size):
    mixer, x = off_their_start(FocusedLinearAttention(Slot(12, 3, (4, 5)))), torch.randn(2, *size, 12)
    before = mixer(x)
    with torch.no_grad():
        mixer.positional_encoding.add_(torch.linspace(-2, 2, 20)[:, None])
    assert before.shape == (2, *size, 12)
    assert not torch.allclose(mixer(x), before) or size == (1, 1)  # a single key has no rival


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (2, 3)])
def test_reduced_keys_pad_maps_that_they_do_not_divide(size):
    slot = Slot(12, 3, (7, 9), packed=False)
    mixer = off_their_start(FocusedLinearAttention(slot, kv_ratio=4))
    assert mixer.positional_encoding.shape == (1, 2 * 3, 12)
    out = mixer(torch.randn(2, *size, 12))
    out.square().sum().backward()
    assert out.shape == (2, *size, 12)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_values_of_a_reduced_map_are_stretched_along_the_order_of_its_tokens():
    x = torch.arange(4.0).view(1, 2, 2, 1)
    stretched = stretch_tokens(x, torch.empty(1, 4, 2, 1)).flatten()
    torch.testing.assert_close(stretched, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


def test_lepe_is_added_where_the_host_has_it():
    mixer = off_their_start(FocusedLinearAttention(Slot(12, 3, (4, 5), lepe=True)))
    v = torch.randn(2, 4, 5, 12)
    torch.testing.assert_close(mixer.local(v), mixer.dwc(v) + mixer.get_v(v))
    assert "get_v.weight" not in FocusedLinearAttention(Slot(12, 3, (4, 5))).state_dict()


def test_names_are_the_published_ones():
    common = {"proj.weight", "proj.bias", "scale", "positional_encoding", "dwc.weight", "dwc.bias"}
    packed = FocusedLinearAttention(Slot(12, 3, (4, 5)))
    apart = FocusedLinearAttention(Slot(12, 3, (4, 5), packed=False))
    assert set(packed.state_dict()) == common | {"qkv.weight", "qkv.bias"}
    assert set(apart.state_dict()) == common | {"q.weight", "q.bias", "kv.weight", "kv.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_finite_where_all_features_of_a_token_vanish(dtype):
    mixer = FocusedLinearAttention(Slot(12, 3, (4, 5)), focusing_factor=4)
    with torch.no_grad():
        mixer.qkv.bias[:24] = -100  # no q and no k is positive
        x = torch.randn(2, 4, 5, 12)
        expected = mixer(x)
        with torch.autocast("cpu", dtype=dtype):
            out = mixer(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel_size": 4}, "kernel of 4 has no middle"),
        ({"focusing_factor": 0.5}, "focusing_factor of 0.5 would blur"),
        ({"kv_ratio": 2}, "kv_ratio 2 reduces a map, and 1 prefix token"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        vitzoo.create_model("vit_micro", mixer="focused_linear", mixer_args=options)


def test_one_exported_graph_serves_every_image_size():
    model = vitzoo.create_model("swin_micro", mixer="focused_linear", mixer_args={"kv_ratio": (2, 1, 1)}).eval()
    shapes = ({0: Dim("batch", max=64), 2: Dim("height", min=33, max=2048), 3: Dim("width", min=33, max=2048)},)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 70, 90),), dynamic_shapes=shapes).module()
        for size in ((1, 3, 33, 47), (3, 3, 96, 64)):
            x = torch.randn(size)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


# -- channels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_channel_attention_sees_no_order_among_tokens(version):
    mixer = ChannelAttention(Slot(12, 3, (4, 5)), version=version)
    x, order = torch.randn(2, 20, 12), torch.randperm(20)
    torch.testing.assert_close(mixer.forward_tokens(x[:, order], 4, 5), mixer.forward_tokens(x, 4, 5)[:, order])
    torch.testing.assert_close(mixer(x.unflatten(1, (4, 5))).flatten(1, 2), mixer.forward_tokens(x, 4, 5))


def test_channel_attention_of_version_2_weighs_queries_against_keys_by_the_number_of_tokens():
    first, second = (ChannelAttention(Slot(12, 3, (4, 5)), version=v) for v in (1, 2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 4, 5, 12)
    q, k, v = (t.flatten(1, 2) for t in second.project(x))
    scores = torch.einsum("bsni,bsnj->bnij", *(t.unflatten(-1, (3, 4)) for t in (q, k))) * 20**-0.5
    expected = torch.einsum("bnij,bsnj->bsni", scores.softmax(-1), v.unflatten(-1, (3, 4))).flatten(2)
    torch.testing.assert_close(second(x).flatten(1, 2), second.proj(expected))
    with pytest.raises(ValueError, match="versions 1 and 2, not 3"):
        ChannelAttention(Slot(12, 3, (4, 5)), version=3)


# -- what mixers of q, k and v have in common -------------------------------------------------------------------------


class Copy(MixedAttention):
    """The values of the queries' own places."""

    def mix(self, q, k, v):
        return q.clone()

    def mix_tokens(self, q, k, v, height, width):
        return q.clone()


@pytest.mark.parametrize("packed", [True, False])
def test_projections_packed_or_apart_give_q_k_and_v_of_the_map(packed):
    mixer, x = Copy(12, 3, packed=packed), torch.randn(2, 4, 5, 12)
    weight = mixer.qkv.weight if packed else torch.cat([mixer.q.weight, mixer.kv.weight])
    bias = mixer.qkv.bias if packed else torch.cat([mixer.q.bias, mixer.kv.bias])
    torch.testing.assert_close(torch.cat(mixer.project(x), -1), F.linear(x, weight, bias))


def test_reduced_keys_come_back_bilinear_for_the_local_term():
    mixer, x = Copy(12, 3, kv_ratio=2, lepe=True), torch.randn(2, 6, 8, 12)
    q, k, v = mixer.project(x)
    assert not mixer.packed
    assert k.shape == v.shape == (2, 3, 4, 12)
    large = F.interpolate(v.permute(0, 3, 1, 2), scale_factor=2, mode="bilinear").permute(0, 2, 3, 1)
    torch.testing.assert_close(mixer(x), mixer.proj(q + mixer.get_v(large)))


def test_prefix_tokens_have_no_local_term():
    mixer, x = Copy(12, 3, lepe=True, prefix_tokens=2), torch.randn(2, 22, 12)
    q, _, v = mixer.project(x)
    out = torch.cat([q[:, :2], q[:, 2:] + mixer.get_v(v[:, 2:].unflatten(1, (4, 5))).flatten(1, 2)], 1)
    torch.testing.assert_close(mixer.forward_tokens(x, 4, 5), mixer.proj(out))
