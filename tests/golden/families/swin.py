"""Swin V1, V2 and the dense backbone of V1, from the arguments of the published classes."""

from __future__ import annotations

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.swin import Swin

# published argument: ours; None: it changes nothing in eval mode, or only how the published code computes
ARGUMENTS = {
    **{name: name for name in ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depths", "num_heads")},
    **{name: name for name in ("window_size", "mlp_ratio", "qkv_bias", "ape", "pretrained_window_sizes")},
    "pretrain_img_size": "img_size",
    "drop_path_rate": None,
    "drop_rate": None,
    "attn_drop_rate": None,
    "use_checkpoint": None,
    "fused_window_process": None,
    "out_indices": None,
    "frozen_stages": None,
}


def check(golden: Golden) -> list[Pair]:
    kwargs = renamed(golden.kwargs, ARGUMENTS)
    if "output" in golden.tensors:
        kwargs |= {"shift_rule": "map"}  # the classifier's rule, for the size it was built for
    else:
        kwargs |= {"shift_rule": "keep", "feature_norm": True, "num_classes": 0}
    if "V2" in golden.published_class:
        kwargs |= {"version": 2}
    return judge(golden, compare_model(golden, Swin(**kwargs)), MODELS, GIVEN)
