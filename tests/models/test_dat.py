"""What the contract does not reach: the kinds of blocks that no published model has, and checkpoints of another variant."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import vitzoo
from tests.models.zoo import image
from vitzoo import checkpoints
from vitzoo.layers import DeformableAttention
from vitzoo.models.dat import DAT, KINDS
from vitzoo.patterns import window

SMALL = dict(embed_dim=16, depths=(3, 3, 4), num_heads=(1, 2, 4), mlp_ratio=2.0, window_size=3, kernel_size=3, groups=1)
SMALL |= dict(blocks=("XEL", "SPD", "XEPN"), sample_strides=(4, 2, 1), offset_kernels=3, sr_ratios=(8, 4, 2), num_classes=7)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("conv_patches", [False, True])
def test_every_kind_of_block_takes_any_image_and_learns(version, conv_patches):
    assert set("".join(SMALL["blocks"])) == set(KINDS)
    model = DAT(**SMALL, version=version, conv_patches=conv_patches, stem_dim=24, lpu=version == 2)
    for size in ((33, 47), (32, 32), (70, 93)):
        final, maps = model.forward_intermediates(image(*size))
        logits = model.forward_head(final)
        assert logits.shape == (2, 7)
        assert [m.shape[2:] for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16)]
    logits.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_slide_attention_alone_sees_nine_tokens():
    model = DAT(**SMALL).eval()
    slide = model.stages[0].blocks[1].attn
    x = torch.randn(1, 7, 7, 16, requires_grad=True)
    slide(x)[0, 3, 3].sum().backward()
    touched = x.grad[0].any(-1).nonzero()
    assert touched.min().item() == 2
    assert touched.max().item() == 4
    assert len(touched) == 9


def test_windows_shift_by_half_rounded_up():
    with torch.device("meta"):
        model = vitzoo.create_model("dat_tiny")
    assert [block.attn.pattern for block in model.stages[0].blocks] == [
        window(7, edge="cover"),
        window(7, shift=4, edge="cover"),
    ]


def test_tables_are_those_of_the_published_sizes():
    def sides(name):
        with torch.device("meta"):
            model = vitzoo.create_model(name)
        return [m.rel_bias.shape[1] for m in model.modules() if isinstance(m, DeformableAttention)]

    assert set(sides("dat_base_384")) == {47, 23}
    assert sides("dat_pp_base_384") == sides("dat_pp_base")
    assert set(sides("dat_pp_tiny")) == {111, 55, 27, 13}


def test_the_points_of_a_block_can_be_drawn():
    model = vitzoo.create_model("dat_micro").eval()
    found = []
    layer = model.stages[1].blocks[1].attn
    layer.register_forward_pre_hook(lambda module, args: found.append(module.points(args[0])))
    with torch.no_grad():
        model(image(64, 80))
    (points,) = found
    assert points.shape == (2, 4, 5, 2, 2)  # images, rows, columns, groups, (y, x)
    assert points.abs().max() <= 1


def test_models_begin_from_pytorchs_own_values_as_published():
    model = vitzoo.create_model("dat_micro")
    layer = model.stages[1].blocks[1].attn
    assert layer.q.weight.abs().max() <= layer.q.in_features**-0.5
    assert layer.q.weight.std() > 0.8 * layer.q.in_features**-0.5 / 3**0.5
    assert layer.rel_bias.std().item() == pytest.approx(0.01, rel=0.2)


def test_no_weight_decay_on_any_table():
    spared = DAT(**SMALL, bias="table").no_weight_decay()
    assert {"stages.0.blocks.1.attn.k_table", "stages.1.blocks.2.attn.rel_bias", "stages.2.blocks.3.attn.rel_bias"} <= spared


def test_a_checkpoint_of_another_variant_is_refused_in_a_sentence(tmp_path):
    # published names, of DAT++ with a stage more, for a small DAT
    names = ("patch_proj.3.weight", "stages.3.attns.1.rpe_table", "stages.1.attns.2.rpe_table.0.weight", "stages.0.attns.0.rpb")
    save_file({name: torch.ones(2, 2, 2, 2) for name in names}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit DAT"):
        checkpoints.load(DAT(**SMALL, version=1), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"blocks": ("ND", "NZ", "D")}, "no block kind 'Z'. Kinds: L, S, D, N, X, P, E"),
        ({"groups": (1, 2)}, r"groups \(1, 2\) names 2 stages, depths \(1, 2, 1\) 3"),
        ({"version": 3}, "version is 1 or 2, got 3"),
    ],
)
def test_what_does_not_exist_is_refused_in_a_sentence(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        vitzoo.create_model("dat_micro", **kwargs)
