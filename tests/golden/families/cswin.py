"""CSWin, its dense backbone and one bare block, from the arguments of the published classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.harness import GIVEN, MODELS, OPS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.cswin import CSWin

ARGUMENTS = {
    **{name: name for name in ("img_size", "in_chans", "num_classes", "embed_dim", "num_heads", "mlp_ratio", "qkv_bias")},
    **{"depth": "depths", "split_size": "split_size"},
    **dict.fromkeys(("patch_size", "drop_path_rate", "drop_rate", "attn_drop_rate", "use_chk")),
}


def check(golden: Golden) -> list[Pair]:
    if golden.published_class == "CSWinBlock":
        return judge(golden, compare_block(golden), OPS, GIVEN)
    kwargs = renamed(golden.kwargs, ARGUMENTS)
    dense = "output" not in golden.tensors
    kwargs["split_size"] = branches(kwargs["split_size"], kwargs["img_size"], dense)
    if dense:
        kwargs |= {"feature_norm": True, "num_classes": 0}
    return judge(golden, compare_model(golden, CSWin(**kwargs)), MODELS, GIVEN)


def branches(split: list[int], img_size: int, dense: bool) -> list[int | None]:
    """None where the published class has one branch: in the last stage, and in the classifier where a stripe is the map."""
    last = len(split) - 1
    return [None if i == last or (not dense and s == img_size // (4 * 2**i)) else s for i, s in enumerate(split)]


def compare_block(golden: Golden) -> Iterator[Pair]:
    """A block alone, as the first of a model; its branches before the projection as well."""
    kwargs = golden.kwargs
    side, heads, dim = kwargs["reso"], kwargs["num_heads"], kwargs["dim"]
    model = CSWin(
        embed_dim=dim, depths=(1,), num_heads=(heads,), split_size=(kwargs["split_size"],), mlp_ratio=kwargs["mlp_ratio"]
    )
    state = model.from_published({f"stage1.0.{key}": value for key, value in golden.below("state/").items()}, model.cfg)
    block = model.get_submodule("stages.0.blocks.0").eval()
    block.load_state_dict({key.removeprefix("stages.0.blocks.0."): value for key, value in state.items()}, strict=True)
    here, exact = (measured_block(golden, b, side) for b in (block, copy.deepcopy(block).double()))
    for name, expected in golden.tensors.items():
        if name.startswith(("output", "intermediate/")) or name == "grad/input":
            yield Pair(name, here[name], expected, rounding=rounding(here, exact, name))
        elif name.startswith("grad/"):
            own = next(iter(model.from_published({f"stage1.0.{name[5:]}": expected}, model.cfg)))
            own = own.replace("stages.0.blocks.0.", "grad/")
            yield Pair(name, here[own], expected, rounding=rounding(here, exact, own))
    with torch.inference_mode():
        out = block(golden.tensors["input"].unflatten(1, (side, side))).flatten(1, 2)
        yield Pair("output", out, golden.tensors["output"], "(inference)")


def rounding(here: dict[str, Tensor], exact: dict[str, Tensor], name: str) -> float:
    return (here[name] - exact[name]).abs().max().item()


def measured_block(golden: Golden, block: Any, side: int) -> dict[str, Tensor]:
    """Output, branches and gradients at the precision of the block, tokens in rows."""
    dtype = next(block.parameters()).dtype
    results: dict[str, Tensor] = {}

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for i, half in enumerate(args[0].flatten(1, 2).chunk(2, dim=-1)):
            results[f"intermediate/attns.{i}"] = half

    handle = block.attn.proj.register_forward_pre_hook(see)
    x = golden.tensors["input"].to(dtype, copy=True).requires_grad_()
    out = block(x.unflatten(1, (side, side))).flatten(1, 2)
    (out * golden.tensors["cotangent"].to(dtype)).sum().backward()
    handle.remove()
    results |= {f"grad/{name}": p.grad for name, p in block.named_parameters()}
    results |= {"output": out, "grad/input": x.grad}
    return {name: value.detach() for name, value in results.items()}
