"""``attend_routed`` beside the gathered form, which copies the keys of every choice: memory and time, forward.

The shapes are those of BiFormer's stages, at the image sizes asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.bench.calls import refuse_wrong
from vitzoo.bench.timing import interleaved, markdown, peak_mib, printed_apart, resident
from vitzoo.ops import attend_routed
from vitzoo.ops.attend_routed.reference import by_region, gather_chosen, to_map

SIZES = (224, 1024)
STAGES = ((4, 2, 1), (8, 4, 4), (16, 8, 16))
"""Stride, heads of 32 channels and choices of BiFormer-T's and -S's stages that route."""
WINDOWS = 7
"""Regions on a side, at any size."""


@dataclass(frozen=True)
class Case:
    """One row: a stage of BiFormer.

    Attributes:
        size: of the image, in pixels on a side.
        stride: pixels per token.
        heads: heads of 32 channels.
        choices: regions that each one sees.
        batch: images.
        device: "cpu" or "cuda".
        dtype: of q, k and v, by its name in torch.
    """

    size: int
    stride: int
    heads: int
    choices: int
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def side(self) -> int:
        """Tokens on a side, padded so that regions divide them."""
        return -(-(self.size // self.stride) // WINDOWS) * WINDOWS

    @property
    def least_mib(self) -> float:
        """Of keys, values and output."""
        numbers = 3 * self.batch * self.side**2 * self.heads * 32
        return numbers * getattr(torch, self.dtype).itemsize / 2**20


@dataclass(frozen=True)
class Result:
    """A measured row; MiB are those that a call allocates at most beyond its arguments, which are there before."""

    case: Case
    error: float
    ms: float
    ratio: float
    memory_mib: float
    gathered_mib: float


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the regions that each region sees, chosen at random."""
    torch.manual_seed(0)
    shape = (case.batch, case.side, case.side, 3, case.heads, 32)
    q, k, v = torch.randn(shape, device=case.device, dtype=getattr(torch, case.dtype)).unbind(3)
    count = WINDOWS**2
    graph = torch.rand(case.batch, count, count, device=case.device).topk(case.choices).indices
    return q, k, v, graph


def ours(q: Tensor, k: Tensor, v: Tensor, graph: Tensor) -> Tensor:
    """Keys are read where they lie."""
    return attend_routed(q, k, v, (WINDOWS, WINDOWS), graph)


def gathered(q: Tensor, k: Tensor, v: Tensor, graph: Tensor) -> Tensor:
    """As many copies of keys and values as there are choices, then PyTorch's attention; Zhu et al. 2023, algorithm 1."""
    regions = (WINDOWS, WINDOWS)
    keys, values = (gather_chosen(by_region(x, regions), graph[:, :, None]) for x in (k, v))
    return to_map(F.scaled_dot_product_attention(by_region(q, regions), keys, values), regions, q)


def peak(case: Case, way: Callable[..., Tensor]) -> float:
    """MiB beyond the arguments that one call allocates at most; on a CPU in a process of its own."""
    device = torch.device(case.device)
    if device.type == "cuda":
        return float(peak_mib(partial(way, *inputs(case)), device) or 0.0)
    return printed_apart(f"from vitzoo.bench.routed import Case, grow; print(grow({case!r}, {way.__name__!r}))")


def grow(case: Case, way: str) -> float:
    """By how many MiB one call makes this process grow, after one of a small case has loaded what it needs."""
    run = globals()[way]
    with torch.no_grad():
        run(*inputs(Case(WINDOWS * 2, 1, 1, case.choices)))
        arguments = inputs(case)
        before = resident("VmRSS")
        run(*arguments)
    return max(resident("VmHWM") - before, 0.0)


def measure(case: Case, rounds: int = 9) -> Result:
    """Check that both forms agree, then time them in turn and take each one's memory.

    Args:
        case: what to measure.
        rounds: how often each is run.

    Returns:
        The measured row; raises RuntimeError where they do not agree.
    """
    arguments = inputs(case)
    with torch.no_grad():
        expected, got = gathered(*arguments), ours(*arguments)
        error = float((got - expected).abs().max() / expected.abs().max())
        refuse_wrong(f"attend_routed on {case}", error, got.dtype)
        mine, other = interleaved([partial(way, *arguments) for way in (ours, gathered)], torch.device(case.device), rounds)
        del expected, got, arguments
        return Result(case, error, 1e3 * mine, other / mine, peak(case, ours), peak(case, gathered))


def cases(sizes: list[int], batch: int | None, device: str, dtype: str) -> list[Case]:
    """Every stage at every size; unless given, a batch of as many pixels as eight images of 224 x 224 have, at least one."""
    batches = [batch or max(1, round(8 * (224 / size) ** 2)) for size in sizes]
    return [Case(size, *stage, n, device, dtype) for size, n in zip(sizes, batches, strict=True) for stage in STAGES]


def table(results: list[Result]) -> str:
    """A Markdown table of results."""
    head = [
        "image",
        "batch",
        "map",
        "heads",
        "regions seen",
        "ms",
        "ratio",
        "k + v + out MiB",
        "MiB at most",
        "gathered MiB",
        "ratio",
    ]
    rows = [
        [
            str(r.case.size),
            str(r.case.batch),
            f"{r.case.side} x {r.case.side}",
            str(r.case.heads),
            f"{r.case.choices} of {WINDOWS**2}",
            f"{r.ms:.1f}",
            f"{r.ratio:.2f}",
            f"{r.case.least_mib:.1f}",
            f"{r.memory_mib:.1f}",
            f"{r.gathered_mib:.1f}",
            f"{r.gathered_mib / r.memory_mib:.2f}" if r.memory_mib else "",
        ]
        for r in results
    ]
    return markdown(head, rows)
