"""VAN, from the arguments of the published class.

The files hold every map before the norm of its stage (the first half of the features) and behind it, as ours are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.van import VAN

ARGUMENTS = {
    **{name: name for name in ("img_size", "in_chans", "num_classes", "depths")},
    "embed_dims": "embed_dim",
    "mlp_ratios": "mlp_ratio",
    **dict.fromkeys(("drop_rate", "drop_path_rate")),
}


def check(golden: Golden) -> list[Pair]:
    kwargs = renamed(golden.kwargs, ARGUMENTS)
    model = VAN(**kwargs, num_heads=(1,) * len(golden.kwargs["depths"]))
    stages = len(model.stages)
    tensors = {ours(name, stages): value for name, value in golden.tensors.items()}
    named = Golden(golden.spec, tensors)
    pairs = list(compare_model(Golden(golden.spec, {n: t for n, t in tensors.items() if not n.startswith("raw/")}), model))
    seen: list[Tensor] = []
    for stage in model.stages:
        stage.blocks.register_forward_hook(lambda module, args, out: seen.append(out.permute(0, 3, 1, 2)))
    with torch.no_grad():
        model(golden.tensors["input"])
    raw = [Pair(f"raw/{i}", value, tensors[f"raw/{i}"]) for i, value in enumerate(seen)]
    return judge(named, [*pairs, *raw], MODELS, GIVEN)


def ours(name: str, stages: int) -> str:
    """The file's name of a tensor; maps before a norm are called raw, those behind it are the features."""
    kind, _, i = name.partition("/")
    if kind != "feature":
        return name
    return f"raw/{i}" if int(i) < stages else f"feature/{int(i) - stages}"
