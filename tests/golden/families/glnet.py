"""GLNet, from the arguments of the published class; GLMix and its block, every step of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.layers import DepthwiseMlp, Slot
from vitzoo.models.glnet import GLBlock, GLMix, GLNet

ARGUMENTS = {
    "depth": "depths",
    "embed_dim": "embed_dim",
    "mlp_ratios": "mlp_ratio",
    "num_classes": "num_classes",
    **dict.fromkeys(("head_dim", "norm_layer", "mixing_modes", "local_dw_ks", "slot_init", "num_slots", "cpe_ks")),
    **dict.fromkeys(("downsample_style", "transition_layout", "mlp_dw", "layerscale")),
}
MIXING = {"glmix": "glmix", "glmix.mha_nchw": "alternate", "mha_nchw": "attend", "mha": "attend"}
BLOCK = "stages.0.blocks.0."


def check(golden: Golden) -> list[Pair]:
    if golden.spec.get("kind") == "op":
        steps = block_steps if golden.spec["cls"] == "GLMixBlock" else relation_steps
        return judge(golden, steps(golden), OPS, (*GIVEN, "init_slots"))
    published = golden.kwargs
    model = GLNet(
        **renamed(published, ARGUMENTS),
        num_heads=tuple(dim // published["head_dim"] for dim in published["embed_dim"]),
        mixing=tuple(MIXING[mode] for mode in published["mixing_modes"]),
        slots=square(published["num_slots"]),
        learned_slots=published["slot_init"] == "param",
        layout="glnet" if published["transition_layout"] == "proj.norm" else "stl",
        layer_scale=published.get("layerscale"),
        drop_odd=True,
    )
    return judge(golden, compare_model(golden, model), MODELS, GIVEN)


def square(slots: int) -> tuple[int, int]:
    return math.isqrt(slots), math.isqrt(slots)


def converted(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Published entries of a block as ours, through the conversion of whole models."""
    ours = GLNet.from_published({BLOCK + key: value for key, value in state.items()}, GLNet.Config())
    return {key.removeprefix(BLOCK + prefix): value for key, value in ours.items()}


def gradients(golden: Golden, module: nn.Module, prefix: str, leaves: dict[str, Tensor]) -> Iterator[Pair]:
    own = dict(module.named_parameters())
    for key, expected in golden.below("grad/").items():
        if key in leaves:
            actual = leaves[key].grad
        else:
            ((name, expected),) = converted({key: expected}, prefix).items()
            actual = own[name].grad
        yield Pair(f"grad/{key}", actual, expected)


def watched(mixer: GLMix) -> dict[str, Tensor]:
    """What the mixer computes on its way, from its next call on, with gradients."""
    seen: dict[str, Tensor] = {}
    compute = mixer.logits

    def keep(name: str, value: Tensor) -> Tensor:
        seen[name] = value
        if value.requires_grad:
            value.retain_grad()
        return value

    mixer.logits = lambda *args: keep("mid/logits", compute(*args))  # type: ignore[method-assign]
    mixer.relation.register_forward_pre_hook(lambda module, args: (keep("mid/slots_clustered", args[0]),))
    mixer.relation.register_forward_hook(lambda module, args, out: keep("mid/slots_updated", out))
    mixer.conv.register_forward_hook(lambda module, args, out: keep("conv", out))
    mixer.register_forward_hook(lambda module, args, out: keep("mixed", out))
    return seen


def relation_steps(golden: Golden) -> Iterator[Pair]:
    slots = square(golden.spec["kwargs"]["num_slots"])
    mixer = GLMix(Slot(golden.spec["kwargs"]["embed_dim"], golden.spec["kwargs"]["num_heads"], (7, 9)), slots=slots)
    mixer.load_state_dict(converted(golden.below("state/"), "attn."), strict=True)
    leaves = {name: golden.tensors[name].clone().requires_grad_() for name in ("input", "init_slots")}
    seen = watched(mixer)
    # slots that are means of one token each of a map are that map
    out = mixer(leaves["input"].permute(0, 2, 3, 1), leaves["init_slots"].unflatten(1, slots)).permute(0, 3, 1, 2)
    (out * golden.tensors["cotangent"]).sum().backward()
    yield Pair("output", out, golden.tensors["output"])
    yield Pair("mid/conv_branch", seen["conv"].permute(0, 3, 1, 2), golden.tensors["mid/conv_branch"])
    for name in ("mid/logits", "mid/slots_clustered", "mid/slots_updated"):
        yield Pair(name, seen[name], golden.tensors[name])
    yield from gradients(golden, mixer, "attn.", leaves | seen)


def block_steps(golden: Golden) -> Iterator[Pair]:
    kwargs = golden.spec["kwargs"]
    dim = kwargs["embed_dim"]
    mixer = GLMix(Slot(dim, kwargs["num_heads"], (7, 9)), slots=square(kwargs["num_slots"]))
    mlp = DepthwiseMlp(dim, int(kwargs["mlp_ratio"] * dim), residual=True)
    block = GLBlock(dim, mixer, positioned=True, mlp=mlp, layer_scale=kwargs["layerscale"], norm_eps=1e-6)
    block.load_state_dict(converted(golden.below("state/"), ""), strict=True)
    x = golden.tensors["input"].clone().requires_grad_()
    seen = watched(mixer)
    out = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    (out * golden.tensors["cotangent"]).sum().backward()
    yield Pair("output", out, golden.tensors["output"])
    yield Pair("mid/relation_out", (seen["mixed"]).permute(0, 3, 1, 2), golden.tensors["mid/relation_out"])
    for name in ("mid/logits", "mid/slots_updated"):
        yield Pair(name, seen[name], golden.tensors[name])
    # logits hold them normed
    start = torch.nn.functional.adaptive_avg_pool2d(x, mixer.slots).flatten(2).mT
    yield Pair("mid/init_slots", start, golden.tensors["mid/init_slots"])
    yield from gradients(golden, block, "", {"input": x})
