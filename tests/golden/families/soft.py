"""SOFT and SOFT-Norm, from the arguments of the published class; the kernel's parts from what went into its first block."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, load, renamed
from vitzoo.layers import softmax_free
from vitzoo.models.soft import SOFT

ARGUMENTS = {
    "embed_dims": "embed_dim",
    "_norm": "normed",
    **{name: name for name in ("img_size", "num_classes", "num_heads", "qkv_bias", "depths")},
    **dict.fromkeys(("patch_size", "mlp_ratios", "sr_ratios", "kernel_method")),
}


def check(golden: Golden) -> list[Pair]:
    published = golden.kwargs
    assert (published["sr_ratios"][-1], published["mlp_ratios"][-1]) == (1, 4)
    model = SOFT(**renamed(published, ARGUMENTS), ratios=tuple(published["sr_ratios"][:-1]))
    parts = list(compare_model(golden, model))
    if "op/block1.0.q" in golden.tensors:
        parts += kernel(golden, model)
    return judge(golden, parts, MODELS, (*GIVEN, "op/block1.0.q", "op/block1.0.v"))


def kernel(golden: Golden, model: SOFT) -> Iterator[Pair]:
    """Landmarks, both kernels, the inverse and the output of the first block's attention."""
    given = golden.below("op/block1.0.")
    attn = load(model, golden.below("state/")).stages[0].blocks[0].attn
    side = round(given["q"].shape[2] ** 0.5)
    q, v = (given[name].transpose(1, 2).unflatten(1, (side, side)) for name in "qv")
    scale = attn.split[1] ** -0.25
    with torch.no_grad():
        landmarks = attn.choose(q * scale)
        ours = {"landmarks": landmarks, "kernel_mm": softmax_free.gaussian(landmarks, landmarks)}
        ours["kernel_qm"] = softmax_free.gaussian(given["q"].flatten(0, 1) * scale, landmarks)
        mm, steps = ours["kernel_mm"], attn.steps
        if attn.dims:  # the file has it before its rows and columns are scaled
            root = mm.sum(-1).sqrt()
            scaled = softmax_free.normed_inverse(mm, steps, attn.dims)
            ours["newton_inverse"] = root.unsqueeze(-1) * scaled * root.unsqueeze(-2)
        else:
            ours["newton_inverse"] = softmax_free.inverse(mm, steps)
        ours["out"] = attn.attend(q, v).flatten(1, 2).transpose(1, 2)
    for name, value in ours.items():
        yield Pair(f"op/block1.0.{name}", value.reshape(given[name].shape), given[name])
