"""PatchConvNet, from the arguments of the published class."""

from __future__ import annotations

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.patchconvnet import PatchConvNet

ARGUMENTS = {
    "img_size": "img_size",
    "num_classes": "num_classes",
    "embed_dim": "embed_dim",
    "qkv_bias": "qkv_bias",
    "mlp_ratio_clstk": "mlp_ratio",
    "multiclass": "per_class",
    **dict.fromkeys(("patch_size", "depth", "num_heads", "depth_token_only")),
}


def check(golden: Golden) -> list[Pair]:
    published = golden.kwargs
    assert (published["patch_size"], published["depth_token_only"]) == (16, 1)
    stages = {"depths": (1,) * published["depth"], "num_heads": (published["num_heads"],) * published["depth"]}
    model = PatchConvNet(**renamed(published, ARGUMENTS), **stages, layer_scale=1e-4)
    return judge(golden, compare_model(golden, model), MODELS, GIVEN)
