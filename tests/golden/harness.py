"""How a golden file is judged: what is compared with what, how far off it may be, what has not been looked at."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vitzoo import checkpoints

MODELS = 1e-4
OPS = 1e-5


class NotYet(Exception):
    """The file is of something that vitzoo does not have yet; the message says of what."""


@dataclass(frozen=True)
class Golden:
    """A golden file: its spec, normalised over the ways in which families wrote it, and its tensors by name."""

    spec: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> Golden:
        with safe_open(path, framework="pt") as file:
            spec = json.loads(file.metadata()["spec"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
        return cls(spec, tensors)

    @property
    def family(self) -> str:
        return self.spec["family"]

    @property
    def kwargs(self) -> dict[str, Any]:
        """Arguments of the published constructor."""
        return self.spec.get("kwargs") or self.spec.get("constructor_kwargs") or {}

    @property
    def published_class(self) -> str:
        return next(self.spec[name] for name in ("class", "class_name", "cls") if name in self.spec)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with ``prefix``, without it."""
        return {name[len(prefix) :]: value for name, value in self.tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Pair:
    """What we compute beside what is published, for the tensor of the file that is called ``name``.

    ``rounding`` is how far our float32 result is from our float64 one: what float32 can tell about this tensor at all.
    """

    name: str
    actual: Tensor
    expected: Tensor
    how: str = ""
    rounding: float = 0.0

    @property
    def scale(self) -> float:
        return self.expected.abs().max().item()

    @property
    def error(self) -> float:
        """Largest difference; another shape and not-a-number count as infinitely wrong."""
        if self.actual.shape != self.expected.shape:
            return math.inf
        difference = (self.actual - self.expected).abs().max().item()
        return math.inf if math.isnan(difference) else difference

    def allowed(self, tolerance: float) -> float:
        """``tolerance`` of the largest published value; where float32 cannot tell that finely, twice its rounding.

        A wrong result is wrong in float64 too and gains nothing by this; an unstable one is stopped at ten tolerances.
        """
        return max(tolerance * self.scale, min(2 * self.rounding, 10 * tolerance * self.scale))

    def __str__(self) -> str:
        label = f"{self.name} {self.how}".strip()
        if self.actual.shape != self.expected.shape:
            return f"{label}: shape {tuple(self.actual.shape)}, published {tuple(self.expected.shape)}"
        relative = self.error / self.scale if self.scale else math.inf
        return (
            f"{label}: off by {self.error:.2e} of {self.scale:.2e} (relative {relative:.1e}); "
            f"float32 rounds it by {self.rounding:.1e}"
        )


def judge(
    golden: Golden, pairs: Iterable[Pair], tolerance: float, given: Iterable[str], excused: Iterable[str] = ()
) -> list[Pair]:
    """Fail, tensor by tensor, unless every tensor of the file was compared and is right.

    What is allowed follows the scale of each tensor (``Pair.allowed``), so a small one gets no more room than a large one.

    Args:
        golden: the file.
        pairs: comparisons; a name may come several times, for several ways to compute it.
        tolerance: allowed difference over the largest published value.
        given: names (or prefixes that end in "/") of inputs and weights.
        excused: names that an adapter does not compare; it says beside them why.

    Returns:
        The comparisons, the worst first.
    """
    __tracebackhide__ = True
    pairs = list(pairs)
    compared = {pair.name for pair in pairs}
    other = tuple(given) + tuple(excused)
    forgotten = [
        name
        for name in golden.tensors
        if name not in compared and name not in other and not any(name.startswith(p) for p in other if p.endswith("/"))
    ]
    assert not forgotten, f"not compared: {', '.join(sorted(forgotten))}"
    assert pairs, "nothing was compared"
    wrong = [pair for pair in pairs if not pair.error <= pair.allowed(tolerance)]
    assert not wrong, f"{len(wrong)} of {len(pairs)} tensors are off by more than {tolerance:g} of their scale:\n" + "\n".join(
        map(str, wrong)
    )
    return sorted(pairs, key=lambda pair: -pair.error / pair.scale if pair.scale else 0.0)


def load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The published weights in our model, through the conversion that users call, strictly."""
    model.load_state_dict(checkpoints.convert(state, model), strict=True)
    return model.eval()


def compare_model(golden: Golden, model: nn.Module) -> Iterator[Pair]:
    """Output, features and gradients of a backbone; with and without gradients, which take different paths on a CPU."""
    load(model, golden.below("state/"))
    exact = measured(golden, copy.deepcopy(model).double())
    published = {name: value for name, value in golden.tensors.items() if name.startswith(("output", "feature/", "grad/"))}
    here = measured(golden, model)
    for name, expected in published.items():
        for own, value in in_our_names(name, expected, model).items():
            yield Pair(name, here[own], value, rounding=(here[own] - exact[own]).abs().max().item())
    with torch.inference_mode():
        final, maps = model.forward_intermediates(golden.tensors["input"])
        for i, expected in golden.below("feature/").items():
            yield Pair(f"feature/{i}", maps[int(i)], expected, "(inference)")
        if "output" in published:
            yield Pair("output", model.forward_head(final), published["output"], "(inference)")
            yield Pair("output", model(golden.tensors["input"]), published["output"], "(inference, forward)")


def measured(golden: Golden, model: nn.Module) -> dict[str, Tensor]:
    """Output, features and, where the file has a cotangent, gradients by our names, at the precision of the model."""
    dtype = next(model.parameters()).dtype
    x = golden.tensors["input"].to(dtype, copy=True).requires_grad_()
    final, maps = model.forward_intermediates(x)
    results = {f"feature/{i}": value for i, value in enumerate(maps)}
    last = maps[-1]
    if "output" in golden.tensors:
        last = results["output"] = model.forward_head(final)
    if "cotangent" in golden.tensors:
        (last * golden.tensors["cotangent"].to(dtype)).sum().backward()
        results |= {f"grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        results["grad/input"] = x.grad
    return {name: value.detach() for name, value in results.items()}


def in_our_names(name: str, value: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """A published tensor as the file calls it; gradients of weights travel to our names as the weights did."""
    kind, _, key = name.partition("/")
    if kind != "grad" or key == "input":
        return {name: value}
    return {f"grad/{own}": part for own, part in checkpoints.convert({key: value}, model).items()}


GIVEN = ("input", "cotangent", "state/")


def renamed(kwargs: dict[str, Any], names: dict[str, str | None]) -> dict[str, Any]:
    """Published constructor arguments under our names; None as a name: means nothing to us. Others are an error."""
    unknown = sorted(key for key in kwargs if key not in names and not key.startswith("_"))
    assert not unknown, f"the adapter does not know the published arguments {', '.join(unknown)}"
    return {names[key]: value for key, value in kwargs.items() if key in names and names[key] is not None}
