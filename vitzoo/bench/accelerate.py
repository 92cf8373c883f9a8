"""timm's models beside what ``vitzoo.accelerate`` makes of them: time and memory, both in one run."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.bench.models import train_step
from vitzoo.bench.timing import Run, markdown, paired, peak_resident

MODELS = (
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "maxvit_tiny_tf_224",
    "twins_svt_small",
    "davit_tiny",
    "gcvit_tiny",
    "deit_small_patch16_224",
    "eva02_tiny_patch14_224",
)
"""What ``python -m vitzoo.bench accelerate`` runs where no model is named."""


@dataclass(frozen=True)
class Case:
    """One row: a model of timm's at a batch.

    Attributes:
        model: timm's name.
        batch: images, of the size that the model was built for.
        forward_only: leave out training.
    """

    model: str
    batch: int = 8
    forward_only: bool = False


@dataclass(frozen=True)
class Result:
    """A measured row; times in ms and memory in MiB are of the accelerated model, ratios theirs over ours.

    ``way`` is "rebuild" where ours was built from the weights, "exchange" where layers were exchanged.
    """

    case: Case
    way: str
    error: float
    forward_ms: float
    forward_ratio: float
    train_ms: float | None
    train_ratio: float | None
    memory_mib: float
    memory_ratio: float


def build(case: Case) -> tuple[nn.Module, nn.Module, Tensor]:
    """timm's model with every parameter off its initial value, the accelerated one and an input."""
    torch.manual_seed(0)
    theirs = timm.create_model(case.model).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    size = timm.data.resolve_data_config({}, model=theirs)["input_size"]
    return theirs, vitzoo.accelerate(theirs), torch.randn(case.batch, *size)


def run(case: Case, which: str) -> None:
    """What memory is measured of: forwards, or training steps, of one of the two models."""
    theirs, ours, x = build(case)
    model = theirs if which == "theirs" else ours
    del theirs, ours
    if case.forward_only:
        with torch.inference_mode():
            for _ in range(3):
                model(x)
        return
    model.train()
    for _ in range(3):
        train_step(model, x)


def peak_memory(case: Case, which: str) -> float:
    """MiB of resident memory at most, in a process of its own (Linux)."""
    return peak_resident(f"from vitzoo.bench.accelerate import Case, run; run({case!r}, {which!r})")


def measure(case: Case, rounds: int = 9) -> Result:
    """Check that both give the same output, then time them in turn and take each one's memory.

    Args:
        case: what to measure.
        rounds: how often each is run.

    Returns:
        The measured row.

    Raises:
        RuntimeError: the outputs differ by more than 1e-3 of their size: nothing is timed.
    """
    theirs, ours, x = build(case)
    with torch.no_grad():
        expected, got = theirs(x), ours(x)
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= 1e-3:
        raise RuntimeError(f"{case.model} and its accelerated form differ by {error:.1e}: not timed.")

    def forward(model: nn.Module) -> Run:
        def once() -> None:
            with torch.inference_mode():
                model(x)

        return once

    forward_ms, forward_ratio = paired(forward(ours), forward(theirs), rounds)
    train_ms = train_ratio = None
    if not case.forward_only:
        ours.train()
        theirs.train()
        train_step(ours, x)
        train_step(theirs, x)
        train_ms, train_ratio = paired(lambda: train_step(ours, x), lambda: train_step(theirs, x), rounds)
    mine, other = (peak_memory(case, which) for which in ("ours", "theirs"))
    way = "exchange" if type(ours) is type(theirs) else "rebuild"
    return Result(case, way, error, forward_ms, forward_ratio, train_ms, train_ratio, mine, other / mine)


def table(results: list[Result]) -> str:
    """A Markdown table of results."""
    head = ["model", "batch", "way", "error", "forward ms", "ratio", "train ms", "ratio", "memory MiB", "ratio"]
    rows = [
        [
            r.case.model,
            str(r.case.batch),
            r.way,
            f"{r.error:.0e}",
            f"{r.forward_ms:.0f}",
            f"{r.forward_ratio:.2f}",
            "" if r.train_ms is None else f"{r.train_ms:.0f}",
            "" if r.train_ratio is None else f"{r.train_ratio:.2f}",
            f"{r.memory_mib:.0f}",
            f"{r.memory_ratio:.2f}",
        ]
        for r in results
    ]
    return markdown(head, rows)
