"""DAT, DAT+, DAT++ and the dense backbone, from the arguments of the published classes; and deformable attention alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.layers import DeformableAttention
from vitzoo.layers.deformable import place_points, table_bias
from vitzoo.models.dat import DAT
from vitzoo.ops import attend

# published argument: ours; None: it changes nothing in eval mode, or is one of those that `kwargs_of` joins
ARGUMENTS = {
    **{name: name for name in ("img_size", "num_classes", "depths", "sr_ratios")},
    "expansion": "mlp_ratio",
    "dim_stem": "stem_dim",
    "dims": "dims",
    "heads": "num_heads",
    "stage_spec": "blocks",
    "window_sizes": "window_size",
    "nat_ksizes": "kernel_size",
    "ksizes": "offset_kernels",
    "offset_range_factor": "offset_range",
    "no_offs": "pooled",
    "use_dwc_mlps": "conv_mlp",
    "use_lpus": "lpu",
    "use_conv_patches": "conv_patches",
    "layer_scale_values": "layer_scales",
    **dict.fromkeys(("patch_size", "use_checkpoint", "groups", "strides", "use_pes", "dwc_pes", "fixed_pes", "log_cpb")),
}


def check(golden: Golden) -> list[Pair]:
    if golden.published_class == "DAttentionBaseline":
        if "input" in golden.tensors:
            return judge(golden, layer(golden), OPS, GIVEN)
        return judge(golden, kernel(golden), OPS, ("q", "k", "v", "rpe_table", "offset", "cotangent"))
    kwargs = kwargs_of(golden.kwargs)
    kwargs["version"] = 1 if golden.spec["vitzoo_kwargs"]["version"] == 1 else 2
    if kwargs["version"] == 1:
        kwargs |= {"lpu": False}
    if "output" not in golden.tensors:
        kwargs |= {"feature_norm": True, "num_classes": 0}
    model = DAT(**kwargs)
    return judge(golden, [*compare_model(golden, model), *points(golden, model)], MODELS, GIVEN)


def kwargs_of(published: dict[str, Any]) -> dict[str, Any]:
    """Our arguments for the published ones; a stage without deformable blocks has -1 in what only they use."""
    ours = renamed(published, ARGUMENTS)
    stages = range(len(published["depths"]))
    ours["embed_dim"] = ours.pop("dims")[0]
    ours["blocks"] = ["".join(kinds) for kinds in ours["blocks"]]
    ours["groups"] = [max(1, groups) for groups in published["groups"]]
    ours["sample_strides"] = [max(1, stride) for stride in published["strides"]]
    ours["layer_scales"] = [value if value > 0 else None for value in ours.get("layer_scales", ())]
    ours["bias"] = [bias_of(published, i) for i in stages]
    return ours


def bias_of(published: dict[str, Any], i: int) -> str:
    """The kind of bias in stage ``i``, in the order in which the published code asks."""
    if not published["use_pes"][i]:
        return "none"
    for name, kind in (("dwc_pes", "conv"), ("fixed_pes", "fixed"), ("log_cpb", "mlp")):
        if name in published and published[name][i]:
            return kind
    return "table"


def points(golden: Golden, model: nn.Module) -> Iterator[Pair]:
    """Sampling points of every deformable block, ``[B, groups, Hk, Wk, 2]`` in the file."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, DeformableAttention):
            _, stage, _, block, _ = name.split(".")
            key = f"stages.{stage}.attns.{block}.pos"
            module.register_forward_pre_hook(lambda m, args, key=key: found.update({key: m.points(args[0])}))
    with torch.no_grad():
        model(golden.tensors["input"])
    for key, expected in golden.below("intermediate/").items():
        yield Pair(f"intermediate/{key}", found[key].movedim(3, 1), expected)


# -- deformable attention alone -------------------------------------------------------------------------------------


def version_of(golden: Golden) -> int:
    return golden.spec.get("vitzoo_kwargs", {}).get("version") or (1 if "stage_idx" in golden.kwargs else 2)


def tokens(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, C, ...]`` to ``[B, L, heads, D]``."""
    return x.flatten(2).transpose(1, 2).unflatten(-1, (heads, -1))


def kernel(golden: Golden) -> Iterator[Pair]:
    """Positions, bias and attention from given q, k, v and raw offsets; one gradient for each of them."""
    kwargs, version = golden.kwargs, version_of(golden)
    B, C, H, W = golden.tensors["q"].shape
    heads, groups = kwargs["n_heads"], kwargs["n_groups"]
    leaves = {name: golden.tensors[name].clone().requires_grad_() for name in ("q", "k", "v", "rpe_table", "offset")}
    offsets = leaves["offset"].unflatten(0, (B, groups)).permute(0, 3, 4, 1, 2)
    pos = place_points(offsets, kwargs["offset_range_factor"], version)
    pos.retain_grad()
    bias = table_bias(leaves["rpe_table"].flip(1, 2), torch.empty(B, H, W, C), pos, version)
    q, k, v = (tokens(leaves[name], heads) for name in ("q", "k", "v"))
    for impl in ("reference", "sdpa"):  # the gradients below are of the last
        out, lse = attend(q, k, v, bias=bias, return_lse=True, impl=impl)
        out = out.flatten(2).transpose(1, 2).reshape(B, C, H, W)
        yield Pair("output", out, golden.tensors["output"], f"by {impl}")
        yield Pair("intermediate/lse", lse.transpose(1, 2), golden.tensors["intermediate/lse"], f"by {impl}")
    yield Pair("pos", pos.movedim(3, 1), golden.tensors["pos"])
    yield Pair("intermediate/bias", bias, golden.tensors["intermediate/bias"])
    (out * golden.tensors["cotangent"]).sum().backward()
    yield Pair("grad/pos", pos.grad.movedim(3, 1), golden.tensors["grad/pos"])
    for name, leaf in leaves.items():
        yield Pair(f"grad/{name}", leaf.grad, golden.tensors[f"grad/{name}"])


def layer(golden: Golden) -> Iterator[Pair]:
    """The whole layer, what flows between its parts, and the gradients of both."""
    published, version = golden.kwargs, version_of(golden)
    kind = next((ours for theirs, ours in (("dwc_pe", "conv"), ("log_cpb", "mlp")) if published.get(theirs)), "table")
    dim = published["n_heads"] * published["n_head_channels"]
    module = DeformableAttention(
        dim,
        published["n_heads"],
        tuple(published["q_size"]),
        groups=published["n_groups"],
        stride=published["stride"],
        kernel_size=published.get("ksize") or (9, 7, 5, 3)[published["stage_idx"]],
        offset_range=published["offset_range_factor"],
        bias=kind,
        version=version,
    )
    cfg = DAT.Config(blocks=("D",) * 4, bias=kind, version=version)

    def convert(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        ours = DAT.from_published({f"stages.2.attns.0.{key}": value for key, value in named.items()}, cfg)
        return {key.removeprefix("stages.2.blocks.0.attn."): value for key, value in ours.items()}

    module.load_state_dict(convert(golden.below("state/")), strict=True)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        if value.requires_grad:
            value.retain_grad()
        seen[name] = value

    for name, part in (("q", module.q), ("k", module.k), ("v", module.v), ("offset_raw", module.offset)):
        part.register_forward_hook(lambda m, args, out, name=name: keep(name, out))
    for name, part in (("attn_out", module.proj), ("x_sampled", module.k)):
        part.register_forward_pre_hook(lambda m, args, name=name: keep(name, args[0]))

    def in_their_shape(name: str, value: torch.Tensor) -> torch.Tensor:
        return value.permute(0, 3, 4, 1, 2).flatten(0, 1) if name == "offset_raw" else value.movedim(-1, 1)

    x = golden.tensors["input"].clone().requires_grad_()
    nhwc = x.permute(0, 2, 3, 1)
    out = module(nhwc).permute(0, 3, 1, 2)
    yield Pair("output", out, golden.tensors["output"])
    with torch.no_grad():
        pos = place_points(seen["offset_raw"], module.offset_range, version)
        still = place_points(torch.zeros_like(seen["offset_raw"]), 0.0, version)
    yield Pair("intermediate/pos", pos.movedim(3, 1), golden.tensors["intermediate/pos"])
    yield Pair("intermediate/reference", still.movedim(3, 1), golden.tensors["intermediate/reference"])
    for name in ("attn_out", "q", "k", "v", "offset_raw", "x_sampled"):
        yield Pair(f"intermediate/{name}", in_their_shape(name, seen[name]), golden.tensors[f"intermediate/{name}"])
    (out * golden.tensors["cotangent"]).sum().backward()
    yield Pair("grad/input", x.grad, golden.tensors["grad/input"])
    for name in ("q", "k", "v", "offset_raw"):
        gradient = in_their_shape(name, seen[name].grad)
        yield Pair(f"grad/intermediate.{name}", gradient, golden.tensors[f"grad/intermediate.{name}"])
    own = dict(module.named_parameters())
    for key, value in golden.below("grad/").items():
        if key != "input" and not key.startswith("intermediate."):
            ((name, expected),) = convert({key: value}).items()
            yield Pair(f"grad/{key}", own[name].grad, expected)
    with torch.inference_mode():
        yield Pair("output", module(nhwc).permute(0, 3, 1, 2), golden.tensors["output"], "(inference)")
        still = module.points(nhwc)
    yield Pair("intermediate/pos", still.movedim(3, 1), golden.tensors["intermediate/pos"], "(points)")
