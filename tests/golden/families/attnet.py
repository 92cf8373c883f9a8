"""AttNet, from the arguments of the published class."""

from __future__ import annotations

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.attnet import AttNet

ARGUMENTS = {
    "num_classes": "num_classes",
    "depths": "depths",
    "dims": "embed_dim",
    "exp_rates": "mlp_ratio",
    "kernel_sizes": "kernel_sizes",
    **dict.fromkeys(("use_layer_scale", "glu_dconv", "glu_norm")),
}


def check(golden: Golden) -> list[Pair]:
    published = golden.kwargs
    assert all(published["glu_dconv"])
    assert len(set(published["glu_norm"])) == 1
    kwargs = renamed(published, ARGUMENTS)
    kwargs |= {"layer_scale": 1e-6 if published["use_layer_scale"] else None, "mlp_norm": published["glu_norm"][0]}
    return judge(golden, compare_model(golden, AttNet(**kwargs)), MODELS, GIVEN)
