"""Reduced models beside the same model as it was: multiply-adds, images a second, latency of one image, memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.bench.timing import Run, forget_peak, interleaved, markdown, peak_mib, printed_apart, resident
from vitzoo.models._cost import count_gmacs

MODEL = "deit_small_patch16_224"
SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tome", {"r": 8}),
    ("tome", {"r": 13}),
    ("tome", {"r": 16}),
    ("evit", {"keep_rate": 0.9}),
    ("evit", {"keep_rate": 0.7}),
    ("evit", {"keep_rate": 0.5}),
    ("dynamicvit", {"keep_rate": 0.7}),
    ("tps", {"keep_rate": 0.7}),
)
"""What ``python -m vitzoo.bench tokens`` puts into each model. Not ATS, whose count of tokens follows from trained attention,
and not Sparsifiner, which leaves as many tokens and saves what only a sparse product would not compute."""


GRAIN = 0.25
"""MiB that Linux counts at once: less than that is not seen."""


@dataclass(frozen=True)
class Case:
    """One model with one reduction.

    Attributes:
        model: a name of ours or of timm's.
        method: of ``vitzoo.tokens``; "none" for the model as it is.
        options: of the method.
        batch: images of a throughput measurement.
        device: "cpu" or "cuda".
        dtype: of weights and images, by its name in torch.
    """

    model: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 16
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def setting(self) -> str:
        """Options as one writes them."""
        return ", ".join(f"{key}={value}" for key, value in self.options.items())


@dataclass(frozen=True)
class Result:
    """A measured row. Ratios are the unreduced model over the reduced one, above 1 is faster or smaller.

    Attributes:
        case: what was measured.
        gmacs: of one image; None where the method's cost depends on what is in it.
        gmacs_ratio: likewise.
        images_per_second: of a batch.
        throughput_ratio: by the medians of interleaved rounds.
        latency_ms: of one image.
        latency_ratio: likewise.
        memory_mib: at most, of inference on a batch, beyond program, model and images.
        memory_ratio: likewise.
    """

    case: Case
    gmacs: float | None
    gmacs_ratio: float | None
    images_per_second: float
    throughput_ratio: float
    latency_ms: float
    latency_ratio: float
    memory_mib: float
    memory_ratio: float


def build(case: Case, device: str | None = None) -> nn.Module:
    """The model of a case in eval mode, reduced; random weights, the same for every reduction of a model."""
    torch.manual_seed(0)
    model = vitzoo.create_model(case.model).eval()
    if case.method != "none":
        vitzoo.tokens.reduce(model, case.method, **case.options)
    return model.to(device or case.device, getattr(torch, case.dtype)).eval()


def images(model: Any, case: Case, batch: int) -> Tensor:
    """A batch of the size that the model was made for."""
    height, width = model.default_cfg["input_size"][1:]
    return torch.randn(batch, model.in_chans, height, width, device=case.device, dtype=getattr(torch, case.dtype))


def gmacs(case: Case) -> float | None:
    """Billions of multiply-adds of one image; None where they are not known before the image is."""
    model: Any = build(case, "meta")
    try:
        return count_gmacs(model, model.default_cfg["input_size"][1:])
    except (NotImplementedError, RuntimeError):  # counts that are read from the data: there are none on the meta device
        return None


def run(case: Case, rounds: int = 3) -> float:
    """MiB that inference on a batch takes at most beyond program, model and images: call it in a process of its own.

    After a first one, for which oneDNN compiles a kernel for every shape and keeps it.
    """
    model = build(case)
    x = images(model, case, case.batch)
    with torch.inference_mode():
        model(x)
        before = resident("VmRSS")
        forget_peak()
        for _ in range(rounds):
            model(x)
    return max(resident("VmHWM") - before, GRAIN)


def peak(case: Case, model: nn.Module, x: Tensor) -> float:
    """MiB of inference at most, beyond what was there before."""
    device = torch.device(case.device)
    if device.type == "cuda":
        return float(peak_mib(_call(model, x), device) or 0.0)
    return printed_apart(f"from vitzoo.bench.reduction import Case, run; print(run({case!r}))")


def _call(model: nn.Module, x: Tensor) -> Run:
    def once() -> None:
        with torch.inference_mode():
            model(x)

    return once


def measure(case: Case, rounds: int = 9) -> Result:
    """Time the reduced model and the model as it was in turn, on a batch and on one image, and take each one's memory.

    Args:
        case: what to measure.
        rounds: how often each is run.

    Returns:
        The measured row.
    """
    plain = Case(case.model, "none", {}, case.batch, case.device, case.dtype)
    models = build(case), build(plain)
    device = torch.device(case.device)
    many, one = (images(models[0], case, n) for n in (case.batch, 1))
    reduced_s, plain_s = interleaved([_call(m, many) for m in models], device, rounds)
    reduced_1, plain_1 = interleaved([_call(m, one) for m in models], device, 3 * rounds)
    cost, whole = gmacs(case), gmacs(plain)
    memory, before = (peak(c, m, many) for c, m in zip((case, plain), models, strict=True))
    return Result(
        case,
        cost,
        None if cost is None or whole is None else whole / cost,
        case.batch / reduced_s,
        plain_s / reduced_s,
        1e3 * reduced_1,
        plain_1 / reduced_1,
        memory,
        before / memory,
    )


def parse(words: str) -> tuple[str, dict[str, Any]]:
    """A method and its options: ``tome:{"r": 13}``, or a method alone.

    Args:
        words: as on the command line.

    Returns:
        Name and options.

    Raises:
        ValueError: there is no such method or option, or what follows the colon is no JSON object.
    """
    name, _, text = words.partition(":")
    if name not in vitzoo.tokens.METHODS:
        raise ValueError(f"There is no method '{name}'. Methods: {', '.join(sorted(vitzoo.tokens.METHODS))}.")
    try:
        options = json.loads(text or "{}")
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f'Options of {name} are a JSON object such as {{"r": 13}}, got {text}.')
    try:
        vitzoo.tokens.METHODS[name](**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}.") from None
    return name, options


def table(results: list[Result]) -> str:
    """A Markdown table of results."""
    head = [
        "model",
        "method",
        "setting",
        "batch",
        "GMACs",
        "ratio",
        "images/s",
        "ratio",
        "ms at batch 1",
        "ratio",
        "MiB",
        "ratio",
    ]
    rows = []
    for r in results:
        cost = ["by image", ""] if r.gmacs is None or r.gmacs_ratio is None else [f"{r.gmacs:.2f}", f"{r.gmacs_ratio:.2f}"]
        speed = [f"{r.images_per_second:.1f}", f"{r.throughput_ratio:.2f}", f"{r.latency_ms:.1f}", f"{r.latency_ratio:.2f}"]
        memory = [f"{r.memory_mib:.0f}", f"{r.memory_ratio:.2f}"]
        rows.append([r.case.model, r.case.method, r.case.setting, str(r.case.batch), *cost, *speed, *memory])
    return markdown(head, rows)
