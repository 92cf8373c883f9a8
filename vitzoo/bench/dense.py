"""Backbones at the image sizes of detection and segmentation: time and peak memory of their maps, against timm's."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import timm
import torch
from torch import Tensor, nn

import vitzoo
from vitzoo.bench.timing import resident
from vitzoo.heads import Maps

SIZES = ((512, 512), (800, 1333), (1024, 2048))
MODELS = ("swin_tiny_patch4_window7_224", "nat_tiny", "dat_tiny", "agent_swin_tiny", "maxvit_tiny_tf_224")


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        model: a listed name.
        size: rows and columns of the image.
        train: forward and backward; else forward.
        checkpoint: recompute every stage in the backward pass.
        theirs: timm's model of that name instead of ours.
    """

    model: str
    size: tuple[int, int]
    train: bool = False
    checkpoint: bool = False
    theirs: bool = False


@dataclass(frozen=True)
class Result:
    """Median seconds of a pass over one image, and peak memory in MiB beyond the idle process; None: it did not run, why."""

    case: Case
    seconds: float | None
    memory_mib: float | None
    why: str = ""


def has_baseline(name: str) -> bool:
    """Whether timm has a model of this name, its own and not ours, that takes other sizes."""
    return timm.is_model(name) and vitzoo.model_info(name).timm_name != name


def build(case: Case) -> nn.Module:
    """A module of images to maps at strides 4, 8, 16, 32."""
    torch.manual_seed(0)
    if not case.theirs:
        return Maps(case.model, norm=False, checkpoint_stages=case.checkpoint)
    try:  # Swin and its kin want to be told; the others take any size that their windows divide
        return timm.create_model(case.model, features_only=True, img_size=case.size)
    except TypeError:
        return timm.create_model(case.model, features_only=True)


def step(model: nn.Module, x: Tensor, *, train: bool) -> None:
    """One pass over ``x``; with ``train`` backward from the mean square of every map."""
    if not train:
        with torch.no_grad():
            model(x)
        return
    torch.stack([y.square().mean() for y in model(x)]).sum().backward()
    model.zero_grad(set_to_none=True)


def run(case: Case, rounds: int = 3) -> tuple[float, float]:
    """Seconds and MiB, measured in this process: call it in one of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(case).to(device).train(case.train)
    x = torch.randn(1, 3, *case.size, device=device)
    before = resident("VmRSS")
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step(model, x, train=case.train)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM") - before
    return statistics.median(seconds), peak


def measure(case: Case, rounds: int = 3) -> Result:
    """Run a case in a process of its own; one that does not run gives the last line of its error."""
    code = f"from vitzoo.bench.dense import Case, run; print(*run({case!r}, {rounds}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        why = lines[-1] if lines else f"ended with status {done.returncode} (out of memory?)"
        return Result(case, None, None, why)
    seconds, memory = (float(v) for v in done.stdout.split()[-2:])
    return Result(case, seconds, memory)


def cases(names: list[str], sizes: list[tuple[int, int]], *, train: bool) -> list[Case]:
    """Ours, ours with checkpoints where it trains, and timm's where it has one, for every model and size."""
    found = []
    for name in names:
        for size in sizes:
            found.append(Case(name, size, train))
            if train:
                found.append(Case(name, size, train, checkpoint=True))
            if has_baseline(name):
                found.append(Case(name, size, train, theirs=True))
    return found


def table(results: list[Result]) -> str:
    """A Markdown table of results."""
    rows = ["| model | of | size | pass | s/image | peak MiB |", "|---|---|---|---|---|---|"]
    for r in results:
        c = r.case
        whose = "timm" if c.theirs else "vitzoo"
        how = ("forward and backward" if c.train else "forward") + (", checkpointed" if c.checkpoint else "")
        figures = f"{r.seconds:.2f} | {r.memory_mib:.0f}" if r.seconds is not None else f"did not run: {r.why} | "
        rows.append(f"| {c.model} | {whose} | {c.size[0]}x{c.size[1]} | {how} | {figures} |")
    return "\n".join(rows)
