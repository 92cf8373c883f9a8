"""Focused linear attention in Swin, PVT, PVT v2 and CSWin, and by itself, from the arguments of the published classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from tests.golden.families.agent import Tokens, below, pvts
from tests.golden.families.ops import run_module
from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.layers import FocusedLinearAttention, OnTokens, Slot
from vitzoo.layers.linear_attention import focus
from vitzoo.models.cswin import CSWin
from vitzoo.models.pvt import PVT
from vitzoo.models.swin import Swin
from vitzoo.ops import using
from vitzoo.ops.linear_attend.api import OP as LINEAR_OP

# published argument: ours; None: read below, or it changes nothing in eval mode
COMMON = {
    **{name: name for name in ("img_size", "num_classes", "embed_dim", "depths", "num_heads", "mlp_ratio", "qkv_bias")},
    **dict.fromkeys(("attn_type", "focusing_factor", "kernel_size", "drop_path_rate")),
}
SWIN = {**COMMON, "patch_size": "patch_size", "window_size": None}
PVT_ = {**COMMON, "embed_dims": "embed_dim", "mlp_ratios": "mlp_ratio", "sr_ratios": "sr_ratios"}
PVT_ |= dict.fromkeys(("patch_size", "norm_eps", "la_sr_ratios"))
CSWIN = {**COMMON, "depth": "depths", **dict.fromkeys(("patch_size", "split_size", "la_split_size"))}


def check(golden: Golden) -> list[Pair]:
    name = golden.published_class
    if name == "FocusedLinearAttention":
        return judge(golden, *attention(golden))
    if name == "FLattenSwinTransformer":
        model: Any = swin(golden.kwargs)
    elif name == "CSWinTransformer":
        model = cswin(golden.kwargs)
    else:
        model = pvt(golden.kwargs, 2 if name.endswith("V2") else 1)
    return judge(golden, compare_model(golden, model), MODELS, GIVEN)


def mixer(published: dict[str, Any]) -> dict[str, Any]:
    """``attn_type``: a letter for each stage, L for focused linear attention and S for the host's own."""
    kinds = {"L": "focused_linear", "S": None}
    options = {name: published[name] for name in ("focusing_factor", "kernel_size")}
    return {"mixer": tuple(kinds[letter] for letter in published["attn_type"]), "mixer_args": options}


def swin(published: dict[str, Any]) -> Swin:
    assert published["window_size"] >= published["img_size"] // published["patch_size"], "linear attention in windows"
    window = 7 if published["window_size"] <= 56 else 12
    return Swin(**renamed(published, SWIN), **mixer(published), window_size=window, shift_rule="map")


def pvt(published: dict[str, Any], version: int) -> PVT:
    assert (published["patch_size"], published["norm_eps"]) == (4, PVT.NORM_EPS)
    kwargs = renamed(published, PVT_) | mixer(published)
    kwargs |= {"version": version, "drop_odd": version == 1, "idle_norm": version == 1}
    kwargs["mixer_args"]["kv_ratio"] = tuple(map(int, published["la_sr_ratios"]))
    return PVT(**kwargs)


def cswin(published: dict[str, Any]) -> CSWin:
    maps = [published["img_size"] // (4 * 2**i) for i in range(len(published["depth"]))]
    assert [int(size) for size in published["la_split_size"].split("-")] == maps, "linear attention in stripes"
    split = tuple(None if size == side else size for size, side in zip(published["split_size"], maps, strict=True))
    return CSWin(**renamed(published, CSWIN), **mixer(published), split_size=split)


# -- the mixer by itself ----------------------------------------------------------------------------------------------


def attention(golden: Golden) -> tuple[list[Pair], float, tuple[str, ...], tuple[str, ...]]:
    """The module on a map with reduced keys; of Swin's the part between the projections. What ``judge`` takes."""
    published = golden.kwargs
    dim, heads = published["dim"], published["num_heads"]
    options = {name: published[name] for name in ("focusing_factor", "kernel_size")}
    if "q" in golden.tensors:
        module = FocusedLinearAttention(Slot(dim, heads, tuple(published["window_size"])), **options)
        call = LINEAR_OP.prepare(*(golden.tensors[name].unflatten(-1, (heads, -1)) for name in "qkv"))
        able = [each.name for each in LINEAR_OP.implementations if each.supports(call) is None]
        pairs = [pair for impl in able for pair in between_projections(golden, module, impl)]
        given = (*GIVEN, "q", "k", "v", "positional_encoding", "scale", "dwc.weight", "dwc.bias")
        # inside the op: attn_out, and the gradients of what goes into it, pin them
        return pairs, OPS, given, ("intermediate/kv", "intermediate/denominator")
    side = round(golden.spec["input_size"][1] ** 0.5)
    module = FocusedLinearAttention(Slot(dim, heads, (side, side), packed=False), kv_ratio=published["sr_ratio"], **options)
    tokens = Tokens(OnTokens(module, 0), side, side)
    return list(run_module(golden, tokens, lambda named: below("module.mixer.", pvts(named)))), OPS, GIVEN, ()


def between_projections(golden: Golden, module: FocusedLinearAttention, impl: str) -> Iterator[Pair]:
    """From q, k, v to what goes into the output projection, and every step on the way."""
    expected, size, how = golden.tensors, tuple(golden.kwargs["window_size"]), f"by {impl}"
    own = dict(module.named_parameters())
    learned = [name for name in own if name in expected]
    module.load_state_dict({name: expected[name] for name in learned}, strict=False)  # the projections are not in the file
    module.zero_grad()
    leaves = {name: expected[name].clone().requires_grad_() for name in "qkv"}
    maps = [leaf.unflatten(1, size) for leaf in leaves.values()]
    with using(impl):
        attended, local = module.mix(*maps), module.local(maps[2])
        yield Pair("output", (attended + local).flatten(1, 2), expected["output"], how)
        yield Pair("intermediate/attn_out", attended.flatten(1, 2), expected["intermediate/attn_out"], how)
        yield Pair("intermediate/dwc_out", local.flatten(1, 2), expected["intermediate/dwc_out"], how)
        with torch.no_grad():  # another path
            yield Pair("output", (module.mix(*maps) + local).flatten(1, 2), expected["output"], f"{how}, no gradients")
    ((attended + local).flatten(1, 2) * expected["cotangent"]).sum().backward()
    for name, leaf in (leaves | {name: own[name] for name in learned}).items():
        yield Pair(f"grad/{name}", leaf.grad, expected[f"grad/{name}"], how)
    for name, t in (("phi_q", leaves["q"]), ("phi_k", leaves["k"] + module.positional_encoding)):
        phi = focus(t, F.softplus(module.scale), module.focusing_factor).unflatten(-1, (module.num_heads, -1))
        yield Pair(f"intermediate/{name}", phi.transpose(1, 2), expected[f"intermediate/{name}"])
