"""NAT, DiNAT, DiNAT_s, the isotropic models and the dense backbones, from the arguments of the published classes."""

from __future__ import annotations

from typing import Any

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.nat import NAT

ARGUMENTS = {
    **{name: name for name in ("num_classes", "embed_dim", "depths", "num_heads", "mlp_ratio", "qkv_bias", "in_chans")},
    **{name: name for name in ("kernel_size", "dilations", "layer_scale")},
    **dict.fromkeys(("drop_path_rate", "drop_rate", "attn_drop_rate", "out_indices", "frozen_stages")),
}
ISOTROPIC = {
    **ARGUMENTS,
    **{name: name for name in ("img_size", "patch_size", "depth", "dilation", "layer")},
}


def check(golden: Golden) -> list[Pair]:
    published = golden.published_class
    kwargs: dict[str, Any]
    if "Isotropic" in published:
        kwargs = isotropic(renamed(golden.kwargs, ISOTROPIC))
    else:
        kwargs = renamed(golden.kwargs, ARGUMENTS)
        if "DiNAT_s" in published:
            kwargs |= {"patch_size": 4, "downsample": "merge"}
        if "output" not in golden.tensors:
            kwargs |= {"feature_norm": True, "num_classes": 0}
    return judge(golden, compare_model(golden, NAT(**kwargs)), MODELS, GIVEN)


def isotropic(published: dict[str, Any]) -> dict[str, Any]:
    """One stage that never goes down; odd blocks dilated; without a kernel it attends globally."""
    depth, heads, layer = (published.pop(name) for name in ("depth", "num_heads", "layer"))
    dilation = published.pop("dilation", None)
    if layer == "VisionTransformerLayer":
        published["kernel_size"] = None
    return {
        **published,
        "depths": (depth,),
        "num_heads": (heads,),
        "dilations": ((1, dilation or 1),),
        "downsample": "none",
        "widen": 1,
    }
