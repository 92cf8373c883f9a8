"""What all checks of token reduction share: a model without weights, and the states behind its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden.harness import Golden, Pair, renamed
from vitzoo import tokens
from vitzoo.models.vit import ViT

ARGUMENTS = {
    **{name: name for name in ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")},
    **{name: name for name in ("global_pool", "qkv_bias", "no_embed_class", "in_chans", "distilled", "reg_tokens")},
}


def vit(golden: Golden, options: dict[str, str | None], **changes: Any) -> ViT:
    """The plain transformer that a published model is at heart, without weights."""
    return ViT(**{**renamed(golden.kwargs, {**ARGUMENTS, **options}), **changes})


def outputs(golden: Golden, model: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a forward computes with and without gradients, which take different paths on a CPU."""
    x = golden.tensors["input"].clone().requires_grad_()
    with watched(model) as seen:
        result = model(x)
    if "cotangent" in golden.tensors:
        (result * golden.tensors["cotangent"]).sum().backward()
        seen |= {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        seen["grad/input"] = x.grad
    yield "", {**seen, "output": result}
    with torch.no_grad(), watched(model) as seen:
        result = model(golden.tensors["input"])
    yield "(inference)", {**seen, "output": result}


class watched:  # reads as the context that it is
    """The states behind every block of a reduced model, by ``state/<block>``."""

    def __init__(self, model: nn.Module) -> None:
        self.method = model.token_reduction

    def __enter__(self) -> dict[str, Any]:
        self.context = tokens._method.watching(self.method, range(self.method.depth), self.method.depth)
        self.watch = self.context.__enter__()
        self.seen: dict[str, Any] = {}
        return self.seen

    def __exit__(self, *error: Any) -> None:
        self.seen |= {f"state/{i}": state for i, state in self.watch.states.items()}
        self.context.__exit__(*error)


def compare(golden: Golden, how: str, ours: dict[str, Any]) -> Iterator[Pair]:
    """Everything of ours that the file has under the same name."""
    for name, value in ours.items():
        if name in golden.tensors and isinstance(value, Tensor):
            yield Pair(name, value.detach().to(golden.tensors[name].dtype), golden.tensors[name], how)
