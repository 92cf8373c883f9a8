"""SpectFormer, vanilla and hierarchical, from the arguments of the published classes."""

from __future__ import annotations

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.spectformer import SpectFormer, SpectFormerH

PLAIN = {name: name for name in ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_classes", "mlp_ratio")}
PYRAMID = {
    **{name: name for name in ("img_size", "in_chans", "num_classes", "num_heads", "depths", "token_label")},
    "stem_hidden_dim": "stem_dim",
    "embed_dims": "embed_dim",
    "mlp_ratios": "mlp_ratio",
    **dict.fromkeys(("norm_eps", "drop_path_rate")),
}


def check(golden: Golden) -> list[Pair]:
    if "stem_hidden_dim" in golden.kwargs:
        height, width = golden.tensors["input"].shape[2:]
        model = SpectFormerH(**renamed(golden.kwargs, PYRAMID), img_size=(height, width))
    else:
        model = SpectFormer(**renamed(golden.kwargs, PLAIN), num_heads=6)  # a constant in the published block
    return judge(golden, compare_model(golden, model), MODELS, GIVEN)
