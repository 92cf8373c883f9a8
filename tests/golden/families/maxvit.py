"""MaxViT in both flavors, from the arguments of timm's and torchvision's classes.

The files count the stem's map as the first feature; ours are the stages', so the stem is compared by itself.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.maxvit import MaxViT

TIMM = {"img_size": "img_size", "num_classes": "num_classes", "cfg": None}
TIMM_CFG = {
    "embed_dim": "embed_dim",
    "depths": "depths",
    "stem_width": "stem_width",
    "head_hidden_size": "head_hidden_size",
    **dict.fromkeys(("stem_bias", "conv_cfg", "transformer_cfg")),
}
TORCHVISION = {
    "input_size": "img_size",
    "stem_channels": "stem_width",
    "partition_size": "window_size",
    "block_channels": "embed_dim",
    "block_layers": "depths",
    "mlp_ratio": "mlp_ratio",
    "expansion_ratio": "expand_ratio",
    "num_classes": "num_classes",
    **dict.fromkeys(("head_dim", "stochastic_depth_prob")),
}


def check(golden: Golden) -> list[Pair]:
    if golden.published_class.startswith("torchvision"):
        kwargs = renamed(golden.kwargs, TORCHVISION) | {"flavor": "tv"}
        head_dim = golden.kwargs["head_dim"]
    else:
        kwargs, head_dim = timm_arguments(golden.kwargs)
    kwargs["num_heads"] = tuple(width // head_dim for width in kwargs["embed_dim"])
    model = MaxViT(**kwargs)

    tensors = {later(name): value for name, value in golden.tensors.items()}
    stages = Golden(golden.spec, {name: value for name, value in tensors.items() if name != "stem"})
    pairs = list(compare_model(stages, model))
    with torch.no_grad():
        stem = model.stem(golden.tensors["input"]).permute(0, 3, 1, 2)
    return judge(Golden(golden.spec, tensors), [*pairs, Pair("stem", stem, tensors["stem"])], MODELS, GIVEN)


def later(name: str) -> str:
    """The file's name of a tensor, features counted from the first stage."""
    kind, _, i = name.partition("/")
    if kind != "feature":
        return name
    return f"feature/{int(i) - 1}" if int(i) else "stem"


def timm_arguments(published: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Ours, and channels of a head; window and grid are a 32nd of the image there."""
    conv, transformer = published["cfg"]["conv_cfg"], published["cfg"]["transformer_cfg"]
    assert (conv["padding"], conv["act_layer"], transformer["rel_pos_type"]) == ("same", "gelu_tanh", "bias_tf")
    kwargs = renamed(published, TIMM) | renamed(published["cfg"], TIMM_CFG)
    size = published["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return {
        **kwargs,
        "window_size": (height // 32, width // 32),
        "mlp_ratio": transformer["expand_ratio"],
        "expand_ratio": conv["expand_ratio"],
    }, transformer["dim_head"]
