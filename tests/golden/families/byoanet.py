"""HaloNet, BoTNet and LambdaNet: timm's nets, with our attention where they attend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn

from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, judge
from vitzoo.layers import with_our_attention

LAYERS: dict[str, type[nn.Module]] = {"HaloAttn": HaloAttn, "BottleneckAttn": BottleneckAttn, "LambdaLayer": LambdaLayer}


def net(kwargs: dict[str, Any]) -> nn.Module:
    """timm's net from the file's arguments."""
    cfg = dict(kwargs["cfg"])
    cfg["blocks"] = tuple(
        tuple(ByoBlockCfg(**b) for b in stage) if isinstance(stage, list) else ByoBlockCfg(**stage) for stage in cfg["blocks"]
    )
    return ByobNet(ByoModelCfg(**cfg), **{name: value for name, value in kwargs.items() if name != "cfg"})


def check(golden: Golden) -> list[Pair]:
    return judge(golden, pairs(golden, net(golden.kwargs)), MODELS, GIVEN)


def layer(golden: Golden) -> list[Pair]:
    given = (*GIVEN, "q", "kv")  # what the layer's own convolutions give
    module = LAYERS[golden.spec["op"]](**golden.kwargs)
    return judge(golden, pairs(golden, nn.ModuleDict({"layer": module}), "layer."), OPS, given)


def pairs(golden: Golden, module: nn.Module, prefix: str = "") -> Iterator[Pair]:
    """Output, features and gradients after the exchange of layers."""
    module.load_state_dict({prefix + key: value for key, value in golden.below("state/").items()}, strict=True)
    with_our_attention(module).eval()
    run: nn.Module = module.layer if isinstance(module, nn.ModuleDict) else module  # type: ignore[assignment]
    x = golden.tensors["input"].clone().requires_grad_()
    if isinstance(run, ByobNet):
        maps = [run.stem(x)]  # pooled, which timm's own first map is not
        for stage in run.stages:
            maps.append(stage(maps[-1]))
        for i, expected in golden.below("feature/").items():
            yield Pair(f"feature/{i}", maps[int(i)], expected)
        output = run.forward_head(run.final_conv(maps[-1]))
    else:
        output = run(x)
    yield Pair("output", output, golden.tensors["output"])
    if "cotangent" in golden.tensors:
        (output * golden.tensors["cotangent"]).sum().backward()
        own = {"input": x, **dict(run.named_parameters())}
        for key, expected in golden.below("grad/").items():
            gradient = own[key].grad
            yield Pair(f"grad/{key}", torch.zeros_like(expected) if gradient is None else gradient, expected)
