"""How anything is timed here: interleaved, by medians, on a clock that fits the device, beside what the machine can do."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import timm
import torch

import vitzoo

Run = Callable[[], object]


def environment(device: torch.device | str = "cpu", dtype: str = "float32") -> dict[str, str]:
    """Commit, versions and device that a table was measured with."""
    root = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = {
        "commit": git.stdout.strip() or "unknown",
        "vitzoo": vitzoo.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": device_name(torch.device(device)),
        "dtype": dtype,
    }
    return facts if torch.device(device).type == "cuda" else {**facts, "threads": str(torch.get_num_threads())}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def seconds(run: Run, device: torch.device, times: int = 1) -> float:
    """Seconds of one call, the mean over ``times`` calls in a row; CUDA events on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times
    begin = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - begin) / times


def interleaved(runs: Sequence[Run], device: torch.device, rounds: int, warm_up: int = 2) -> list[float]:
    """Median seconds of each run; every round runs all of them, in an order that turns from round to round.

    Args:
        runs: what to time; each is one call, or on a GPU a handful of calls is put between two events so that the clock's
            grain does not count.
        device: where they run.
        rounds: how often.
        warm_up: calls of each that are not timed.

    Returns:
        Seconds, in the order of ``runs``.
    """
    for run in runs:
        for _ in range(warm_up):
            run()
    times = 5 if device.type == "cuda" else 1
    measured: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for place in range(len(runs)):
            i = (place + turn) % len(runs)
            measured[i].append(seconds(runs[i], device, times))
    return [statistics.median(each) for each in measured]


def peak_mib(run: Run, device: torch.device) -> float | None:
    """MiB that one call allocates on a GPU above what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def resident(field: str) -> float:
    """MiB of this process by a field of ``/proc/self/status`` (Linux); not getrusage, whose maximum is inherited."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024


def forget_peak() -> None:
    """Let ``resident("VmHWM")`` begin again from what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def printed_apart(code: str) -> float:
    """The last number that Python code prints in a process of its own, where memory that is freed is given back at once.

    Otherwise gaps between what is kept count as used, and a model whose tensors change in size has more of them.
    """
    given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given_back)
    return float(done.stdout.split()[-1])


def peak_resident(code: str) -> float:
    """MiB of resident memory at most that Python code takes in a process of its own (Linux)."""
    return printed_apart(f"{code}\nfrom vitzoo.bench.timing import resident; print(resident('VmHWM'))")


def paired(ours: Run, theirs: Run, rounds: int) -> tuple[float, float]:
    """Median milliseconds of ours, and the median over rounds of theirs / ours; the order turns every round."""
    mine, ratios = [], []
    for i in range(rounds):
        first, second = (ours, theirs) if i % 2 else (theirs, ours)
        a, b = (seconds(run, torch.device("cpu")) for run in (first, second))
        own, other = (a, b) if i % 2 else (b, a)
        mine.append(own)
        ratios.append(other / own)
    return 1e3 * statistics.median(mine), statistics.median(ratios)


@dataclass(frozen=True)
class Ceiling:
    """What the machine reaches: bytes a second of a copy (read and written), FLOPs a second of a matrix product."""

    bytes_per_second: float
    flops_per_second: float


@cache
def ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Measured on the spot, so that percentages mean this machine and not a data sheet."""
    gpu = device.type == "cuda"
    source = torch.empty(2**30 if gpu else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192 if gpu else 1024
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    copy, product = interleaved([lambda: target.copy_(source), lambda: a @ b], device, rounds=5)
    return Ceiling(2 * source.numel() / copy, 2 * n**3 / product)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
