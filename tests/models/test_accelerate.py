"""What ``vitzoo.accelerate`` returns equals the model it was given, whatever that was created with."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.davit import DaVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.gcvit import GlobalContextVit
from timm.models.maxxvit import MaxxVit, model_cfgs
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.twins import Twins
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitzoo
from vitzoo.models._accelerate import REBUILD, ways

SWIN = {"img_size": 48, "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 6}
VIT = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 32, 32), "stem_width": 16, "head_hidden_size": 16}


def maxvit(name: str, **kwargs: object) -> MaxxVit:
    return MaxxVit(model_cfgs[name], img_size=64, **SMALL, **kwargs)


REBUILT = {
    "swin, three heads and a gap": lambda: SwinTransformer(**{**SWIN, "depths": (2, 3), "num_heads": (2, 4)}, in_chans=5),
    "swin, smaller last map": lambda: SwinTransformer(**{**SWIN, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}, qkv_bias=False),
    "swin v2": lambda: SwinTransformerV2(**SWIN, pretrained_window_sizes=(4, 4), num_classes=7),
    "maxvit": lambda: maxvit("maxvit_tiny_tf", num_classes=3),
    "vit": lambda: VisionTransformer(**VIT, num_classes=5, in_chans=1),
    "vit, registers": lambda: VisionTransformer(**VIT, reg_tokens=2, no_embed_class=True, init_values=0.1, global_pool="avg"),
    "vit, normed queries": lambda: VisionTransformer(**VIT, qk_norm=True, num_classes=0, qkv_bias=False),
    "deit, distilled": lambda: VisionTransformerDistilled(**VIT),
}
EXCHANGED = {
    "swin, every window": lambda: SwinTransformer(**{**SWIN, "window_size": 12}, always_partition=True),
    "maxvit, mlp bias": lambda: maxvit("maxvit_rmlp_pico_rw"),
    "vit, gated": lambda: VisionTransformer(**VIT, act_layer="silu", scale_attn_norm=True),
    "eva": lambda: Eva(**VIT, use_rot_pos_emb=True, swiglu_mlp=True, qkv_fused=True),
    "eva, separate": lambda: Eva(**VIT, use_rot_pos_emb=True, qkv_fused=False, attn_type="rope", norm_layer=nn.LayerNorm),
    "twins": lambda: Twins(
        img_size=64, embed_dims=(16, 32), num_heads=(1, 2), mlp_ratios=(2, 2), depths=(2, 2), sr_ratios=(4, 2), wss=(7, 7)
    ),
    "davit": lambda: DaVit(depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), window_size=5),
    "davit, florence": lambda: DaVit(
        depths=(1, 1), embed_dims=(16, 32), num_heads=(1, 2), channel_attn_v2=True, down_kernel_size=3, named_blocks=True
    ),
    "gc vit": lambda: GlobalContextVit(
        img_size=64, window_size=(2, 2, 4), embed_dim=16, depths=(2, 2, 2), num_heads=(1, 2, 2), layer_scale=0.5
    ),
}


def moved(make) -> nn.Module:
    """A model in eval mode whose parameters and batch statistics are all off their initial value."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return model


def picture(model: nn.Module) -> torch.Tensor:
    size = getattr(getattr(model, "patch_embed", model), "img_size", 64)
    height, width = size if isinstance(size, tuple) else (size, size)
    return torch.randn(2, model.in_chans, height, width, generator=torch.Generator().manual_seed(1))


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("case", [*REBUILT, *EXCHANGED])
def test_gives_the_same_outputs_and_gradients(case):
    theirs = moved({**REBUILT, **EXCHANGED}[case])
    ours = vitzoo.accelerate(theirs, check=False)
    assert (type(ours) is type(theirs)) == (case in EXCHANGED)
    if case in EXCHANGED:
        assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    x = picture(theirs)
    sums = []
    for model in (theirs, ours):
        output = model(x)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        sums.append(
            (output.detach(), torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum())
        )
    assert_equal(sums[1][0], sums[0][0])
    assert_equal(sums[1][1], sums[0][1], 1e-3)
    with torch.no_grad():  # another path on a CPU
        assert_equal(ours(x), sums[0][0])


def test_keeps_mode_precision_and_what_is_frozen():
    theirs = moved(REBUILT["vit"]).train().to(torch.float64)
    theirs.blocks[0].requires_grad_(False)
    ours = vitzoo.accelerate(theirs)
    assert ours.training
    assert [p.requires_grad for p in ours.blocks[0].parameters()] == [False] * 12
    assert ours.blocks[1].attn.qkv.weight.requires_grad
    assert ours.head.weight.dtype == torch.float64
    assert ours.head.weight.data_ptr() != theirs.head.weight.data_ptr()


@pytest.mark.parametrize("known", ["swin_tiny_patch4_window7_224", "davit_tiny"])
def test_feature_extractors_give_the_same_maps(known):
    small = {"depths": (1, 1), "num_heads": (1, 2)}
    small |= {"embed_dim": 16} if known.startswith("swin") else {"embed_dims": (16, 32)}
    theirs = moved(lambda: timm.create_model(known, features_only=True, out_indices=(0, 1), **small))
    ours = vitzoo.accelerate(theirs)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for a, b in zip(ours(x), theirs(x), strict=True):
            assert_equal(a, b)


def test_a_backbone_inside_another_model_is_found():
    whole = nn.Sequential(moved(EXCHANGED["gc vit"]), nn.Linear(1000, 2))
    faster = vitzoo.accelerate(whole, check=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_equal(faster(x), whole(x))
        assert faster(torch.randn(1, 3, 50, 71)).shape == (1, 2)  # which timm's refuses
    assert "vitzoo" not in type(whole[0].stages[0]).__module__


def test_ours_comes_back_as_it_is():
    model = vitzoo.create_model("nat_micro")
    assert vitzoo.accelerate(model) is model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: timm.create_model("test_resnet"), r"ResNet has no attention that vitzoo computes.*swin_transformer"),
        (lambda: SwinTransformer(**{**SWIN, "img_size": 40}), r"rolls its 20 x 20 map before it pads it to windows of 6 x 6"),
        (lambda: VisionTransformer(**VIT, attn_drop_rate=0.1), r"dropout of 0\.1.*attn_drop_rate=0"),
    ],
    ids=["no attention", "windows that do not divide", "dropout of attention"],
)
def test_what_cannot_be_accelerated_says_why(make, reason):
    with pytest.raises(ValueError, match=reason):
        vitzoo.accelerate(make())


def test_a_difference_is_noticed(monkeypatch):
    wrong = vitzoo.create_model("vit_micro", img_size=32, num_classes=10)
    monkeypatch.setitem(REBUILD, VisionTransformer, lambda model: wrong)
    monkeypatch.setattr("vitzoo.models._accelerate._rebuilt", lambda model: wrong.eval())
    theirs = VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=4, num_heads=2, num_classes=10)
    with pytest.raises(RuntimeError, match="differs from the model by"):
        vitzoo.accelerate(theirs)


def test_the_table_names_every_class_once():
    kinds = [way.kind for way in ways()]
    assert len(kinds) == len(set(kinds))
    assert {way.how for way in ways()} == {"rebuild", "exchange"}
