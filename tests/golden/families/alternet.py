"""AlterNet, from the arguments of the published class."""

from __future__ import annotations

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.alternet import AlterNet

ARGUMENTS = {
    "num_blocks": "depths",
    "num_blocks2": "attentions",
    "heads": "num_heads",
    "dim_head": "head_dim",
    "_width": "embed_dim",
    "_pool": "stem_pool",
    **{name: name for name in ("num_classes", "window_size")},
}


def check(golden: Golden) -> list[Pair]:
    published = golden.kwargs
    expansion = 4 if published.get("_bottleneck") else 1
    model = AlterNet(**renamed(published, ARGUMENTS), expansion=expansion)
    return judge(golden, compare_model(golden, model), MODELS, GIVEN)
