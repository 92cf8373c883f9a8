"""`linear_attend` and `channel_attend` against their own PyTorch path, eager and compiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from vitzoo.bench.calls import OpResult, Way, refuse_wrong, timed
from vitzoo.ops import channel_attend, linear_attend

CHECKED_TOKENS = 3200
"""Of the longest sequence on which a case is checked; the definition of linear attention holds every pair."""


@dataclass(frozen=True)
class TokenCase:
    """One row: an op on tokens that attend to themselves.

    Attributes:
        op: "linear_attend" or "channel_attend".
        batch: images.
        tokens: of each.
        heads: heads.
        head_dim: channels of a head.
    """

    op: str
    batch: int
    tokens: int
    heads: int = 3
    head_dim: int = 32

    def __str__(self) -> str:
        return f"{self.op}, {self.batch} x {self.tokens}, {self.heads} x {self.head_dim}"


GPU_CASES = (
    TokenCase("linear_attend", 256, 3136),
    TokenCase("linear_attend", 256, 784, heads=6),
    TokenCase("linear_attend", 3, 512 * 512),
    TokenCase("linear_attend", 256, 784, heads=2, head_dim=64),
    TokenCase("channel_attend", 256, 3136),
    TokenCase("channel_attend", 256, 784, heads=6),
    TokenCase("channel_attend", 3, 512 * 512),
    TokenCase("channel_attend", 256, 784, heads=4, head_dim=48),
)
CPU_CASES = (TokenCase("linear_attend", 8, 3136), TokenCase("channel_attend", 8, 3136))
"""What ``python -m vitzoo.bench ops`` runs on a CPU."""


def _ours(q: Tensor, k: Tensor, v: Tensor, op: str, impl: str) -> Tensor:
    if op == "linear_attend":
        return linear_attend(q, k, v, impl=impl)
    return channel_attend(q, k, v, scale=q.shape[1] ** -0.5, impl=impl)


@cache
def _compiled() -> Any:
    return torch.compile(_ours)


def _by_compiler(q: Tensor, k: Tensor, v: Tensor, op: str) -> Tensor:
    if not q.is_cuda:
        raise ValueError("compiled PyTorch is measured on a GPU.")
    return _compiled()(q, k, v, op, "torch")


def ways(device: torch.device) -> dict[str, Way]:
    """Every way to compute the op, ours first."""
    first = {"triton": partial(_ours, impl="triton")} if device.type == "cuda" else {}
    return {**first, "pytorch": partial(_ours, impl="torch"), "compiled": _by_compiler}


def _inputs(case: TokenCase, batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (batch, tokens, 3, case.heads, case.head_dim)
    packed = torch.randn(shape, device=device, dtype=dtype)
    if case.op == "linear_attend":  # features are not negative
        packed[:, :, :2].abs_()
    return packed.requires_grad_(), torch.randn(batch, tokens, *shape[3:], device=device, dtype=dtype)


def error_of(way: Way, case: TokenCase, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of output and gradients from the definition in fp64, over the definition's largest value."""
    packed, cotangent = _inputs(case, 1, min(case.tokens, CHECKED_TOKENS), device, dtype)

    def everything(run: Way, to: torch.dtype) -> list[Tensor]:
        x = packed.detach().to(to).requires_grad_()
        out = run(*x.unbind(2), case.op)
        out.backward(cotangent.to(to))
        parts = () if x.grad is None else x.grad.unbind(2)  # of a scale each
        return [r.detach().double() for r in (out, *parts)]

    exact = everything(partial(_ours, impl="reference"), torch.float64)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(everything(way, dtype), exact, strict=True))


def measure(case: TokenCase, device: torch.device, dtype: torch.dtype, rounds: int = 9) -> OpResult:
    """Check ours, then time every way that takes the case.

    Args:
        case: what to measure.
        device: where.
        dtype: of q, k and v.
        rounds: interleaved rounds.

    Returns:
        The measured row; a result that is off by more than the dtype allows raises instead (`refuse_wrong`).
    """
    candidates = ways(device)
    mine = next(iter(candidates))
    error = error_of(candidates[mine], case, device, dtype)
    refuse_wrong(f"{case}: {mine}", error, dtype)
    made = [_inputs(case, case.batch, case.tokens, device, dtype) for _ in range(3 if device.type == "cuda" else 1)]

    def call(way: Way, packed: Tensor) -> Tensor:
        return way(*packed.unbind(2), case.op)

    numbers = case.batch * case.tokens * case.heads * case.head_dim
    out = case.op == "linear_attend"  # its backward reads out too
    moved = (4 * numbers * dtype.itemsize, (8 if out else 7) * numbers * dtype.itemsize)
    flops = (4 * numbers * case.head_dim, 8 * numbers * case.head_dim)  # two and four products of tokens and a matrix
    sets = [([packed], cotangent) for packed, cotangent in made]
    return timed(case, error, candidates, call, sets, moved, flops, rounds)
