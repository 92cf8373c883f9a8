"""Twins, DaViT and GC ViT from the arguments of the published classes, and Twins' attention in windows."""

from __future__ import annotations

from typing import Any

from timm.models.twins import LocallyGroupedAttn
from torch import nn

from tests.golden.families import ops
from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.davit import DaViT
from vitzoo.models.gcvit import GCViT
from vitzoo.models.twins import LocalAttention, Twins

TWINS = {
    **{name: name for name in ("patch_size", "embed_dims", "num_heads", "mlp_ratios", "depths", "sr_ratios", "img_size")},
    **{name: name for name in ("num_classes", "wss")},
    "qkv_bias": None,  # true in all
    "norm_layer": None,  # LayerNorm with 1e-6 in all
}
DAVIT = {name: name for name in ("embed_dims", "num_heads", "depths", "window_size", "mlp_ratio", "num_classes")}
GCVIT = {
    **{name: name for name in ("depths", "window_size", "mlp_ratio", "num_heads", "num_classes", "layer_scale")},
    "dim": "embed_dim",
    "resolution": "img_size",
}
FAMILIES: dict[str, tuple[Any, dict[str, str | None]]] = {
    "twins": (Twins, TWINS),
    "davit": (DaViT, DAVIT),
    "gcvit": (GCViT, GCVIT),
}


def check(golden: Golden) -> list[Pair]:
    if golden.published_class == "GroupAttention":
        return windows(golden)
    if golden.published_class.startswith("ChannelAttention"):
        return ops.davit(golden)
    cls, names = FAMILIES[golden.family]
    return judge(golden, compare_model(golden, cls(**renamed(golden.kwargs, names))), MODELS, GIVEN)


def windows(golden: Golden) -> list[Pair]:
    """Attention in zero-padded windows; the published dense backbone's mask is another one, and timm's is this."""
    kwargs = golden.kwargs
    size = tuple(golden.spec["size"])
    module = LocalAttention(LocallyGroupedAttn(kwargs["dim"], kwargs["num_heads"], ws=kwargs["ws"]))

    class OnMap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x):
            return self.attention(x, size)

    pairs = ops.run_module(golden, OnMap(), lambda named: {f"attention.{key}": value for key, value in named.items()})
    return judge(golden, pairs, OPS, GIVEN, excused=("output_masked",))
