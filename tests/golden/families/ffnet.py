"""FFNet, from the arguments of the published class."""

from __future__ import annotations

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.ffnet import FFNet

ARGUMENTS = {
    "num_classes": "num_classes",
    "embed_dim": "embed_dim",
    "in_dim": "stem_dim",
    "depth": "depths",
    "kernel_sizes": "channel_kernels",
    "kernel_sizes1": "token_kernels",
    "layer_scale_init_value": "layer_scale",
    **dict.fromkeys(("kernel_sizes2", "use_layer_scale", "drop_path_rate")),
}


def check(golden: Golden) -> list[Pair]:
    published = golden.kwargs
    assert published["kernel_sizes1"] == published["kernel_sizes2"]
    kwargs = renamed(published, ARGUMENTS)
    return judge(golden, compare_model(golden, FFNet(**kwargs)), MODELS, GIVEN)
