"""Agent attention in its four hosts and the two dense backbones, from the arguments of the published classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.families.ops import run_module
from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.layers import AgentAttention, OnTokens, Slot
from vitzoo.layers.agent import pool_map
from vitzoo.models.cswin import CSWin
from vitzoo.models.deit import DeiT
from vitzoo.models.pvt import PVT
from vitzoo.models.swin import Swin
from vitzoo.ops import attend

# published argument: ours; None: read below, or it changes nothing in eval mode
COMMON = {
    **{name: name for name in ("img_size", "patch_size", "num_classes", "embed_dim", "depths", "num_heads", "mlp_ratio")},
    **dict.fromkeys(("agent_num", "attn_type", "downstream_agent_shapes", "kernel_size", "scale", "drop_path_rate")),
    "qkv_bias": "qkv_bias",
}
SWIN = {**COMMON, "window_size": None}
PVT_ = {**COMMON, "patch_size": None, "embed_dims": "embed_dim", "mlp_ratios": "mlp_ratio", "sr_ratios": "sr_ratios"}
PVT_ |= {"norm_eps": None, "agent_sr_ratios": None}
DEIT = {**COMMON, "depth": "depth", "agent_layer": None}
CSWIN = {**COMMON, "patch_size": None, "depth": "depths", "split_size": None, "la_split_size": None}


def check(golden: Golden) -> list[Pair]:
    published = golden.kwargs
    assert (published.get("kernel_size", 3), published.get("scale", -0.5)) == (3, -0.5)
    name = golden.published_class
    if name == "AgentAttention":
        return judge(golden, attention(golden), OPS, (*GIVEN, "q", "k", "v"))
    if name == "VisionTransformer":
        return judge(golden, deit(golden), MODELS, (*GIVEN, "intermediate/"))
    build = {"AgentSwinTransformer": swin, "PyramidVisionTransformer": pvt, "AgentPVT": pvt, "CSWinTransformer": cswin}[name]
    return judge(golden, compare_model(golden, build(golden)), MODELS, GIVEN)


def mixer(published: dict[str, Any]) -> dict[str, Any]:
    """``attn_type``: a letter for each stage; the number behind them says how many blocks of stage M have agents."""
    stages = len(published["num_heads"])
    letters, count = published["attn_type"][:stages], published["attn_type"][stages:]
    agents = {"A": "agent", "B": None, "M": ("agent", int(count or 0))}
    options = {"agents": tuple(published["agent_num"])}
    if "downstream_agent_shapes" in published:
        options["agent_shape"] = tuple(map(tuple, published["downstream_agent_shapes"]))
    return {"mixer": tuple(agents[letter] for letter in letters), "mixer_args": options}


def swin(golden: Golden) -> Swin:
    published = golden.kwargs
    assert published["window_size"] >= published["img_size"] // published.get("patch_size", 4), "agents in windows"
    kwargs = renamed(published, SWIN) | mixer(published) | {"window_size": max(7, published["window_size"] // 8)}
    if "output" in golden.tensors:
        return Swin(**kwargs, shift_rule="map")
    return Swin(**kwargs, shift_rule="keep", feature_norm=True, num_classes=0)


def pvt(golden: Golden) -> PVT:
    published = golden.kwargs
    assert (published["patch_size"], published["norm_eps"]) == (4, PVT.NORM_EPS)
    kwargs = renamed(published, PVT_) | mixer(published) | {"drop_odd": True}
    kwargs["mixer_args"]["kv_ratio"] = tuple(map(int, published["agent_sr_ratios"]))
    return PVT(**kwargs) if "output" in golden.tensors else PVT(**kwargs, num_classes=0)


def cswin(golden: Golden) -> CSWin:
    published = golden.kwargs
    maps = [published["img_size"] // (4 * 2**i) for i in range(len(published["depth"]))]
    assert [int(size) for size in published["la_split_size"].split("-")] == maps, "agents in stripes"
    split = tuple(None if size == side else size for size, side in zip(published["split_size"], maps, strict=True))
    return CSWin(**renamed(published, CSWIN), **mixer(published), split_size=split)


def deit(golden: Golden) -> Iterator[Pair]:
    """Two blocks for each number of agents, the third number for six of them; the files hold tokens after every block."""
    published = golden.kwargs
    numbers = published["agent_num"]
    agents = tuple(numbers[(0, 1, 2, 2, 2, 3)[block // 2]] for block in range(published["depth"]))
    model = DeiT(**renamed(published, DEIT), mixer=("agent", published["agent_layer"]), mixer_args={"agents": agents})
    yield from compare_model(golden, model)
    with torch.no_grad():
        final, blocks = model.forward_intermediates(golden.tensors["input"], return_prefix_tokens=True, output_fmt="NLC")
    for i, (patches, prefix) in enumerate(blocks):
        yield Pair(f"intermediate/blocks.{i}", torch.cat([prefix, patches], dim=1), golden.tensors[f"intermediate/blocks.{i}"])
    yield Pair("intermediate/norm", final, golden.tensors["intermediate/norm"])


# -- the mixer by itself ----------------------------------------------------------------------------------------------


def attention(golden: Golden) -> Iterator[Pair]:
    """The module with a class token, or on a map with reduced keys; of Swin's the part between the projections."""
    spec, published = golden.spec, golden.kwargs
    dim, heads = published["dim"], published["num_heads"]
    if "q" in golden.tensors:
        size = tuple(published["window_size"])
        yield from between_projections(golden, AgentAttention(Slot(dim, heads, size), agents=published["agent_num"]))
    elif "window" in published:
        side = published["window"]
        slot = Slot(dim, heads, (side, side), prefix_tokens=1)
        module = OnTokens(AgentAttention(slot, agents=published["agent_num"]), 1)
        yield from run_module(golden, Tokens(module, side, side), lambda named: below("module.mixer.", named))
    else:
        height, width = spec["forward_args"]
        slot = Slot(dim, heads, (height, width), packed=False)
        module = AgentAttention(slot, agents=published["agent_num"], kv_ratio=published["sr_ratio"])
        yield from run_module(
            golden, Tokens(OnTokens(module, 0), height, width), lambda named: below("module.mixer.", pvts(named))
        )


class Tokens(nn.Module):
    """A mixer on tokens whose grid is fixed."""

    def __init__(self, module: nn.Module, height: int, width: int) -> None:
        super().__init__()
        self.module, self.size = module, (height, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, *self.size)


def below(prefix: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in named.items()}


def pvts(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """A published attention module's entries as ours, through the conversion of whole models."""
    where = ("block1.0.attn.", "stages.0.blocks.0.attn.")
    ours = PVT.from_published(below(where[0], named), PVT.Config())
    return {name.removeprefix(where[1]): value for name, value in ours.items()}


def between_projections(golden: Golden, module: AgentAttention) -> Iterator[Pair]:
    """From q, k, v to what goes into the output projection, and every step on the way."""
    expected, size = golden.tensors, tuple(golden.kwargs["window_size"])
    module.load_state_dict(golden.below("state/"), strict=False)  # the projections are not in the file
    leaves = {name: expected[name].clone().requires_grad_() for name in "qkv"}
    q, k, v = (leaf.unflatten(1, size) for leaf in leaves.values())
    agents = module.heads(pool_map(q, module.grid))
    key_bias, query_bias = module.key_bias(k), module.query_bias(q)
    read = attend(agents, module.heads(k.flatten(1, 2)), module.heads(v.flatten(1, 2)), bias=key_bias)
    attended = attend(module.heads(q.flatten(1, 2)), agents, read, bias=query_bias).flatten(2)
    out = attended + module.local(v).flatten(1, 2)
    steps = {"agent": agents, "agent_v": read, "bias_agent_key": key_bias, "bias_query_agent": query_bias}
    for step in steps.values():
        step.retain_grad()
    (out * expected["cotangent"]).sum().backward()

    for name, step in steps.items():
        here, gradient = (t.transpose(1, 2) if t.ndim == 4 else t for t in (step, step.grad))  # heads before agents
        yield Pair(f"intermediate/{name}", here, expected[f"intermediate/{name}"])
        yield Pair(f"grad/intermediate.{name}", gradient, expected[f"grad/intermediate.{name}"])
    for name, leaf in (dict(module.named_parameters()) | leaves).items():
        if leaf.grad is not None:
            yield Pair(f"grad/{name}", leaf.grad, expected[f"grad/{name}"])
    yield Pair("output", out, expected["output"], "(step by step)")
    yield Pair("intermediate/attn_out", module.mix(q, k, v).flatten(1, 2), expected["intermediate/attn_out"])
    with torch.no_grad():
        yield Pair("output", (module.mix(q, k, v) + module.local(v)).flatten(1, 2), expected["output"], "(inference)")
