"""What a model is made of, counted on the meta device: layers, learned numbers, multiply-adds, activations, who sees whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vitzoo.models._cost import COUNTED
from vitzoo.models._registry import create_model
from vitzoo.patterns import Pattern

__all__ = ["Attention", "Part", "anatomy"]


@dataclass(frozen=True)
class Attention:
    """One kind of call of an attention op.

    Attributes:
        op: its name.
        pattern: who sees whom; None where no pattern says it (routed, linear and pooled attention).
        rows: of the map of queries; 0 where the queries are no map.
        cols: likewise.
        heads: of the call.
        calls: how many of them.
    """

    op: str
    pattern: Pattern | None
    rows: int
    cols: int
    heads: int
    calls: int


@dataclass(frozen=True)
class Part:
    """A part of a model: its stem, one of its stages, its head.

    Attributes:
        name: of the module.
        kind: its class, and how many blocks it holds.
        output: shape of what it returns, for one image.
        params: learned numbers.
        gmacs: multiply-adds, in billions.
        activations: numbers that its convolutions and linear layers put out, in millions.
        attention: the attention that it computes.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    params: int
    gmacs: float
    activations: float
    attention: tuple[Attention, ...]


class _Calls(TorchDispatchMode):
    """Writes down the calls of our ops, each with the part of the model that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "vitzoo" and not name.endswith("backward") and args[0].ndim >= 4:
            q = args[0]
            ints, rows, cols = (tuple(args[4]), *q.shape[1:3]) if name == "attend2d" else (None, 0, 0)
            key = self.part, name, ints, rows, cols, q.shape[-2]
            self.found[key] += 1
        return func(*args, **(kwargs or {}))


def anatomy(name: str, img_size: int | tuple[int, int] | None = None, **kwargs: Any) -> list[Part]:
    """The parts of a model, in the order in which they run.

    Args:
        name: of a model of ours.
        img_size: rows and columns of the image; None: those it was published at.
        **kwargs: as for ``create_model``.

    Returns:
        A row for each child of the model that has parameters or attends, and for each stage.
    """
    with torch.device("meta"):
        model: Any = create_model(name, **kwargs).eval()
    cfg: Any = model.pretrained_cfg
    size = (img_size, img_size) if isinstance(img_size, int) else img_size or tuple(cfg["input_size"][1:])
    parts = _parts(model)
    calls, outputs, activations = _Calls(), {}, Counter()  # type: ignore[var-annotated]
    owner = {id(m): part for part, child in parts.items() for m in child.modules()}

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            activations[owner.get(id(module), "")] += output.numel()

    def enter(part: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            calls.part = part

        return hook

    def keep(part: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[part] = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
            calls.part = ""

        return hook

    for part, child in parts.items():
        child.register_forward_pre_hook(enter(part))
        child.register_forward_hook(keep(part))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(leave)
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with torch.no_grad(), counter, calls:
        model(torch.empty(1, model.in_chans, *size, device="meta"))
    flops = {key.partition(".")[2]: sum(value.values()) for key, value in counter.get_flop_counts().items()}
    return [
        Part(
            name=part,
            kind=_kind(child),
            output=outputs.get(part, ()),
            params=sum(p.numel() for p in child.parameters()),
            gmacs=flops.get(part, 0) / 2e9,
            activations=activations[part] / 1e6,
            attention=tuple(
                Attention(op, Pattern.from_ints(list(ints)) if ints else None, rows, cols, heads, count)
                for (where, op, ints, rows, cols, heads), count in calls.found.items()
                if where == part
            ),
        )
        for part, child in parts.items()
    ]


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """Children of a model; a list of stages or blocks is opened where it holds at most eight."""
    found: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and name == "stages":
            found |= {f"{name}.{i}": stage for i, stage in child.named_children()}
        else:
            found[name] = child
    return {name: child for name, child in found.items() if any(True for _ in child.parameters())}


def _kind(module: nn.Module) -> str:
    blocks = getattr(module, "blocks", module if isinstance(module, (nn.ModuleList, nn.Sequential)) else ())
    inside = ", ".join(f"{count} {kind}" for kind, count in Counter(type(block).__name__ for block in blocks).items())
    return inside if inside else type(module).__name__
