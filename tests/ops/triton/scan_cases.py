"""Calls of selective_scan for the interpreter: one token, ragged tiles, several blocks, strides, half precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.triton.attend_cases import error


class Case(NamedTuple):
    L: int
    C: int
    B: int = 2
    dtype: torch.dtype = torch.float32
    packed: bool = False
    length: float = 1.0


CASES = {
    "scan: one token": Case(1, 3),
    "scan: a ragged tile, channels that fill no block": Case(23, 5),
    "scan: two tiles, two blocks": Case(70, 40, B=1),
    "scan: a step that fades nearly all, and none": Case(20, 16, length=60.0),
    "scan: u and the steps out of one projection": Case(70, 8, packed=True),
    "scan: half precision": Case(34, 8, dtype=torch.float16),
}


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, ...]:
    """u, delta, a, b and the gradient of the states."""
    B, L, C = case.B, case.L, case.C
    both = torch.randn(B, L, 2, C, dtype=case.dtype, device=device)
    both[:, :, 1] = torch.rand(B, L, C, device=device) * case.length
    u, delta = both.unbind(2) if case.packed else (both[:, :, 0].clone(), both[:, :, 1].clone())
    delta[:, ::3] = 0
    a, b = -torch.rand(C, device=device), torch.randn(B, L, dtype=case.dtype, device=device)
    grad = torch.randn(B, C, L, device=device).transpose(1, 2) / max(1.0, case.length)
    return u, delta, a, b, grad


def oracle(u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Every state as the sum over all tokens before it, by the product of the fadings between them."""
    fade = (delta * a).cumsum(1)
    apart = fade[:, :, None] - fade[:, None]
    earlier = torch.ones(u.shape[1], u.shape[1], dtype=torch.bool, device=u.device).tril()
    weights = torch.where(earlier[:, :, None], apart, float("-inf")).exp()
    return torch.einsum("blsc,bsc->blc", weights, delta * b[..., None] * u)


def gradients(run, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `run` gives in `dtype`: states and every gradient by name."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (u, delta, a, b)]
    states = run(*leaves)
    found = torch.autograd.grad(states, leaves, grad.to(states.dtype))
    return {"states": states.detach(), **dict(zip(("du", "ddelta", "da", "db"), found, strict=True))}


def kernels(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The same by our forward and backward."""
    from vitzoo.ops.selective_scan import triton

    states = triton.forward(u, delta, a, b)
    found = triton.backward(grad, u, delta, a, b, states)
    return dict(zip(("states", "du", "ddelta", "da", "db"), (states, *found), strict=True))


def measure(case: Case) -> dict[str, float]:
    """The largest error of every result, relative to its largest value where that exceeds 1."""
    torch.manual_seed(0)
    given = inputs(case)
    exact = gradients(oracle, *given, dtype=torch.float64)
    return {name: error(value.double(), exact[name]) for name, value in kernels(*given).items()}
