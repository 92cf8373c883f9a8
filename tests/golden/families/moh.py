"""MoH-ViT, from the arguments of the published class."""

from __future__ import annotations

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.moh import MoH

ARGUMENTS = {
    "embed_dims": "embed_dim",
    "mlp_ratios": "mlp_ratio",
    "sr_ratios": "pool_ratios",
    "shared_head": "shared_heads",
    "routed_head": "routed_heads",
    **{name: name for name in ("img_size", "num_classes", "num_heads", "qkv_bias", "depths", "pretrain_size")},
    **dict.fromkeys(("window_size", "patch_size", "norm_layer")),
}


def check(golden: Golden) -> list[Pair]:
    published = golden.kwargs
    assert set(published["window_size"]) == {3, None}
    model = MoH(**{"pretrain_size": published["img_size"], **renamed(published, ARGUMENTS)})
    # a bias that all keys of a softmax share, and a router of one head, whose weight is always 1: only rounding is left
    dead = [f"grad/{name}" for name in golden.spec["dead_parameters"]]
    dead += [f"grad/block{i}.0.attn.wg.weight" for i, heads in enumerate(published["routed_head"], 1) if heads == 1]
    assert all(golden.tensors[name].abs().max() < 1e-6 for name in dead if name in golden.tensors)
    rest = Golden(golden.spec, {name: value for name, value in golden.tensors.items() if name not in dead})
    return judge(rest, compare_model(rest, model), MODELS, GIVEN)
