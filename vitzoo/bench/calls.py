"""One op, several ways to compute it, the same tensors: what every table of ops is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitzoo.bench.timing import ceiling, interleaved, markdown, peak_mib

Way = Callable[..., Tensor]
"""A way to compute an op, from its arguments to its output."""


@dataclass(frozen=True)
class OpResult:
    """A measured row: milliseconds by way, and what our call moved and computed at least.

    Attributes:
        case: what was measured.
        dtype: of q, k and v.
        error: largest difference from the definition in fp64, of its largest value.
        forward_ms: by way; ours is the first.
        backward_ms: by way, without the forward.
        memory_mib: of our forward and backward together; None on a CPU.
        refused: ways that could not run it, with the reason.
        of_copy: bytes of forward and of backward over what a copy would move in the same time.
        of_product: the same for FLOPs and a matrix product.
    """

    case: Any
    dtype: str
    error: float
    forward_ms: dict[str, float]
    backward_ms: dict[str, float]
    memory_mib: dict[str, float | None]
    of_copy: tuple[float, float]
    of_product: tuple[float, float]
    refused: dict[str, str] = field(default_factory=dict)


def refuse_wrong(what: str, error: float, dtype: torch.dtype) -> None:
    """Raise RuntimeError where a result is off by more than the dtype allows: nothing is timed then.

    Args:
        what: for the message.
        error: largest difference from the definition, of its largest value.
        dtype: of the inputs.

    Raises:
        RuntimeError: it is off.
    """
    allowed = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    if not error <= allowed:
        raise RuntimeError(f"{what} is off by {error:.1e}, more than {allowed:g}: not timed.")


def timed(
    case: Any,
    error: float,
    candidates: Mapping[str, Way],
    call: Callable[..., Tensor],
    sets: Sequence[tuple[Sequence[Tensor], Tensor]],
    moved: tuple[float, float],
    flops: tuple[float, float],
    rounds: int,
) -> OpResult:
    """Time every way that takes a case, forward and backward.

    Args:
        case: what is measured.
        error: of our way.
        candidates: ways by name, ours first.
        call: calls a way with the leaves of a set.
        sets: leaves that need gradients, and the gradient of the output; taken in turn.
        moved: bytes that forward and backward move at least.
        flops: FLOPs that they compute at least.
        rounds: interleaved rounds.

    Returns:
        The measured row.
    """
    cotangent = sets[0][1]
    device, dtype = cotangent.device, cotangent.dtype
    turn = {"forward": 0, "backward": 0}

    def forward(way: Way) -> None:
        leaves, _ = sets[turn["forward"] % len(sets)]
        turn["forward"] += 1
        with torch.no_grad():
            call(way, *leaves)

    def both(way: Way) -> None:
        leaves, cotangent = sets[turn["backward"] % len(sets)]
        turn["backward"] += 1
        call(way, *leaves).backward(cotangent)
        for leaf in leaves:
            leaf.grad = None

    able, refused = {}, {}
    for name, way in candidates.items():
        try:
            both(way)
            able[name] = way
        except (ValueError, NotImplementedError, torch.OutOfMemoryError) as reason:
            refused[name] = str(reason).splitlines()[0]
    ahead = interleaved([partial(forward, way) for way in able.values()], device, rounds)
    whole = interleaved([partial(both, way) for way in able.values()], device, rounds)
    backward = [max(b - a, 0.0) for a, b in zip(ahead, whole, strict=True)]

    top = ceiling(device, dtype)
    times = (ahead[0], backward[0])
    return OpResult(
        case,
        str(dtype).removeprefix("torch."),
        error,
        dict(zip(able, (1e3 * t for t in ahead), strict=True)),
        dict(zip(able, (1e3 * t for t in backward), strict=True)),
        {name: peak_mib(partial(both, way), device) for name, way in able.items()},
        tuple(b / t / top.bytes_per_second if t else 0.0 for b, t in zip(moved, times, strict=True)),  # type: ignore[arg-type]
        tuple(f / t / top.flops_per_second if t else 0.0 for f, t in zip(flops, times, strict=True)),  # type: ignore[arg-type]
        refused,
    )


def table(results: list[OpResult]) -> str:
    """Markdown: our milliseconds, the others as ratios to ours."""
    others = sorted({name for r in results for name in list(r.forward_ms)[1:]})
    head = ["case", "error", "forward ms", "of copy", "of product", *others]
    head += ["backward ms", "of copy", "of product", *others, "memory MiB"]
    rows = []
    for r in results:
        cells = [str(r.case), f"{r.error:.0e}"]
        for times, copied, computed in zip((r.forward_ms, r.backward_ms), r.of_copy, r.of_product, strict=True):
            own = next(iter(times.values()))
            cells += [f"{own:.3f}", f"{copied:.0%}", f"{computed:.0%}"]
            cells += [f"{times[name] / own:.2f}" if name in times and own else "" for name in others]
        memory = next(iter(r.memory_mib.values()))
        rows.append([*cells, "" if memory is None else f"{memory:.0f}"])
    return markdown(head, rows)


def as_json(result: OpResult) -> dict[str, Any]:
    """A result with its pattern as text."""
    return {**asdict(result), "case": str(result.case)}
