"""A2Mamba, from the arguments of the published class; its state space model by itself, every step of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.a2mamba import A2Mamba, StateSpace
from vitzoo.ops import selective_scan

ARGUMENTS = {
    "embed_dims": "embed_dim",
    "window_size": "kernel_size",
    "mlp_ratios": "mlp_ratio",
    "projection": "head_hidden_size",
    "image_size": "img_size",
    **{name: name for name in ("num_classes", "in_chans", "depths", "num_heads")},
    **dict.fromkeys(("window_dilation", "use_rpb", "resscales", "layerscales", "layer_init_values", "drop_path_rate")),
}


def check(golden: Golden) -> list[Pair]:
    if golden.spec["builder"] == "a2ssm_op":
        return judge(golden, state_space(golden), OPS, (*GIVEN, "attn1", "attn2"))
    published = golden.kwargs
    # a stage is scaled where its weights are
    state = golden.below("state/")
    scaled = [f"layers.{2 * i}.blocks.0.layer_scale1.weight" in state for i in range(len(published["depths"]))]
    model = A2Mamba(
        **renamed(published, ARGUMENTS),
        scale_init=tuple(1.0 if each else None for each in scaled),
        scale_skip=any(published.get("resscales") or ()),
    )
    return judge(golden, compare_model(golden, model), MODELS, GIVEN)


def state_space(golden: Golden) -> Iterator[Pair]:
    """With the file's attention maps in place of ours, which are computed where they are used."""
    dim, heads = golden.kwargs["d_model"], golden.kwargs["num_heads"]
    module = StateSpace(dim, heads)
    prefix = "stages.0.blocks.0.attn.ssm."
    named = {f"layers.0.blocks.0.token_mixer.ssm.{key}": value for key, value in golden.below("state/").items()}
    module.load_state_dict({key.removeprefix(prefix): v for key, v in A2Mamba.from_published(named, A2Mamba.Config()).items()})
    leaves = {name: golden.tensors[name].clone().requires_grad_() for name in ("input", "attn1", "attn2")}
    u, h, c = module.states(leaves["input"].permute(0, 2, 3, 1))
    states = h.unflatten(-1, (2, heads // 2, dim // heads)).unbind(-3)
    size = golden.spec["call"]["kernel"]
    gathered = [
        gather(part, leaves[name], size, dilation)
        for part, name, dilation in zip(states, ("attn1", "attn2"), ((1, 1), golden.spec["call"]["dilation"]), strict=True)
    ]
    out = module.read(u, torch.cat(gathered, dim=-2), c).permute(0, 3, 1, 2)
    (out * golden.tensors["cotangent"]).sum().backward()
    yield Pair("output", out, golden.tensors["output"])
    yield from scan(golden, module)
    for name, expected in golden.below("grad/").items():
        if name in leaves:
            yield Pair(f"grad/{name}", leaves[name].grad, expected)
            continue
        key = f"layers.0.blocks.0.token_mixer.ssm.{name}"
        for own, value in A2Mamba.from_published({key: expected}, A2Mamba.Config()).items():
            yield Pair(f"grad/{name}", module.get_parameter(own.removeprefix(prefix)).grad, value)


def scan(golden: Golden, module: StateSpace) -> Iterator[Pair]:
    """What enters the recurrence and the states, in the file's layout."""
    u = F.silu(module.conv(golden.tensors["input"].permute(0, 2, 3, 1))).flatten(1, 2)
    rank, b, c = module.x_proj(u).split((module.rank, 1, 1), dim=-1)
    delta = F.linear(rank, module.dt_proj.weight)
    step = F.softplus(delta + module.dt_proj.bias)
    ours = {"u": u, "B": b, "C": c, "delta_raw": delta}
    for name, value in ours.items():
        yield Pair(f"scan/{name}", value.transpose(1, 2), golden.tensors[f"scan/{name}"])
    for impl in ("torch", "reference"):
        states = selective_scan(u, step, -module.rate.exp(), b[..., 0], impl=impl)
        yield Pair("scan/state", states.transpose(1, 2)[:, :, None], golden.tensors["scan/state"], impl)


def gather(x: Tensor, weights: Tensor, size: int, dilation: tuple[int, int] | list[int]) -> Tensor:
    """``[B, H, W, N, D]`` summed over neighborhoods by weights ``[B, N, H, W, size * size]``, key by key."""
    height, width = x.shape[1:3]
    rows, cols = (
        torch.tensor([neighbors(i, n, size, step) for i in range(n)])
        for n, step in ((height, dilation[0]), (width, dilation[1]))
    )
    keys = x[:, rows[:, None, :, None], cols[None, :, None, :]].flatten(3, 4)
    return torch.einsum("bnhwk,bhwknd->bhwnd", weights, keys)


def neighbors(i: int, n: int, size: int, step: int) -> list[int]:
    residue = range(i % step, n, step)
    start = max(0, min(i // step - size // 2, len(residue) - size))
    return list(residue[start : start + size])
