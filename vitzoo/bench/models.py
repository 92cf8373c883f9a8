"""Whole models against their baseline: forward, forward and backward, and peak memory in training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.bench.baselines import baseline_of
from vitzoo.bench.timing import Run, markdown, paired, peak_resident


@dataclass(frozen=True)
class Case:
    """One row: a model at a batch and image size.

    Attributes:
        model: a listed name.
        batch: images.
        size: pixels on a side.
        forward_only: leave out training (for models that are too large to train on the machine).
    """

    model: str
    batch: int = 8
    size: int = 224
    forward_only: bool = False


CASES = (
    Case("swin_tiny_patch4_window7_224"),
    Case("swin_tiny_patch4_window7_224", size=256),
    Case("swin_tiny_patch4_window7_224", size=384),
    Case("swin_tiny_patch4_window7_224", batch=4, size=512),
    Case("swin_base_patch4_window7_224"),
    Case("nat_tiny", forward_only=True),
)
"""What ``python -m vitzoo.bench models`` runs where no model is named."""


@dataclass(frozen=True)
class Result:
    """A measured row; times in ms are medians, ratios are baseline over ours, the median over interleaved rounds."""

    case: Case
    baseline: str
    error: float
    forward_ms: float
    forward_ratio: float
    train_ms: float | None = None
    train_ratio: float | None = None
    memory_mib: float | None = None
    memory_ratio: float | None = None


def build(case: Case) -> tuple[str, nn.Module, nn.Module, Tensor]:
    """Baseline's name, baseline, our model (same weights, biases and tables included) and an input."""
    torch.manual_seed(0)
    model = vitzoo.create_model(case.model).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("rel_bias"):
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    name, baseline = baseline_of(case.model, model, case.size)
    return name, baseline.eval(), model, torch.randn(case.batch, 3, case.size, case.size)


def train_step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward of the mean output; gradients are dropped."""
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


def measure(case: Case, rounds: int = 9, memory: bool = True) -> Result:
    """Check that both give the same output, then time them in turn.

    Args:
        case: what to measure.
        rounds: how often each is run.
        memory: measure peak memory too, in processes of their own.

    Returns:
        The measured row.

    Raises:
        RuntimeError: the outputs differ by more than 1e-3 of their size at the model's own image size: nothing is timed.
            At other sizes timm pads after rolling where we pad before, so outputs are not compared there.
    """
    baseline_name, baseline, model, x = build(case)
    native = vitzoo.model_info(case.model).img_size[0] == case.size
    with torch.no_grad():
        expected, got = baseline(x), model(x)
    error = float((got - expected).abs().max() / expected.abs().max()) if native else float("nan")
    if error > 1e-3:
        raise RuntimeError(f"{case.model} and its baseline {baseline_name} differ by {error:.1e}: not timed.")

    def forward(m: nn.Module) -> Run:
        def run() -> None:
            with torch.no_grad():
                m(x)

        return run

    forward_ms, forward_ratio = paired(forward(model), forward(baseline), rounds)
    result = Result(case, baseline_name, error, forward_ms, forward_ratio)
    if case.forward_only:
        return result
    for m in (model, baseline):
        m.train()
        train_step(m, x)
    train_ms, train_ratio = paired(lambda: train_step(model, x), lambda: train_step(baseline, x), rounds)
    ours, theirs = (peak_memory(case, which) for which in ("ours", "baseline")) if memory else (None, None)
    return Result(
        case,
        baseline_name,
        error,
        forward_ms,
        forward_ratio,
        train_ms,
        train_ratio,
        ours,
        theirs / ours if ours and theirs else None,
    )


def peak_memory(case: Case, which: str) -> float:
    """MiB of resident memory at most, over three training steps in a process of their own (Linux)."""
    return peak_resident(
        "from vitzoo.bench.models import Case, build, train_step\n"
        f"name, baseline, ours, x = build({case!r}); m = ours if {which!r} == 'ours' else baseline\n"
        "del baseline, ours; m.train(); [train_step(m, x) for _ in range(3)]"
    )


def table(results: list[Result]) -> str:
    """A Markdown table of results."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None or math.isnan(value) else format(value, form)

    head = ["model", "batch", "size", "baseline", "error", "forward ms", "ratio", "train ms", "ratio", "memory MiB", "ratio"]
    rows = [
        [
            r.case.model,
            str(r.case.batch),
            str(r.case.size),
            r.baseline,
            cell(r.error, ".0e"),
            cell(r.forward_ms, ".0f"),
            cell(r.forward_ratio, ".2f"),
            cell(r.train_ms, ".0f"),
            cell(r.train_ratio, ".2f"),
            cell(r.memory_mib, ".0f"),
            cell(r.memory_ratio, ".2f"),
        ]
        for r in results
    ]
    return markdown(head, rows)
