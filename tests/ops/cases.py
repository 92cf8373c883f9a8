"""Patterns, sizes and inputs that the tests of attend2d share: the awkward sizes first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitzoo.patterns import (
    Pattern,
    Span,
    axial,
    dilated_window,
    everywhere,
    grid,
    halo,
    neighborhood,
    stripe,
    window,
)

PATTERNS = (
    window(4),
    window(4, shift=1),
    window((7, 3), shift=(3, 2)),
    window(7, shift=3, edge="cover"),
    window(20, shift=5, edge="cover"),
    dilated_window(3, interval=2),
    stripe(rows=2),
    stripe(cols=3),
    axial("row"),
    everywhere,
    halo(4, 1),
    halo(3, 2),
    neighborhood(3),
    neighborhood(7),
    neighborhood(5, dilation=2),
    neighborhood((3, 5), dilation=(4, 1)),
    neighborhood(5, stride=2),
    neighborhood(6, stride=3),
    neighborhood(4, dilation=2, stride=3),
    Pattern(Span(5), Span(4)),
    Pattern(Span(None, 3), Span(5, 2, 3, 1)),
    Pattern(Span(5, 3, 3, 2, "clamp"), Span(2)),
)
RAGGED = tuple((p, size) for p in PATTERNS for size in ((13, 17), (7, 8))) + (
    (grid((4, 5)), (8, 15)),
    (grid(2), (2, 6)),
    (window(3, shift=1), (1, 6)),  # one row
    (window(3, shift=1, edge="cover"), (1, 1)),  # one key
    (neighborhood(1), (3, 2)),
    (neighborhood(7), (7, 7)),  # a neighborhood that is everything
    (halo(2, 3), (2, 5)),
    (window(4, shift=2), (9, 14)),
    (neighborhood(3, dilation=3), (9, 14)),
)
CASES = [
    (p, size)
    for p, size in RAGGED
    if all(s.edge != "clamp" or n >= s.size * s.step for s, n in zip((p.rows, p.cols), size, strict=True))
]


def case_id(value: object) -> str:
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else repr(value)


class Inputs(NamedTuple):
    """A packed projection, its three views, a bias table and cotangents of out and lse."""

    qkv: Tensor
    bias: Tensor
    dout: Tensor
    dlse: Tensor

    @property
    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv.unbind(3)

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(*(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self))


def inputs(pattern: Pattern, size: tuple[int, int], B: int = 2, N: int = 3, D: int = 24, dtype=torch.float64) -> Inputs:
    reach_y, reach_x = pattern.reach(*size)
    return Inputs(
        torch.randn(B, *size, 3, N, D, dtype=dtype, requires_grad=True),
        torch.randn(N, 2 * reach_y + 1, 2 * reach_x + 1, dtype=dtype, requires_grad=True),
        torch.randn(B, *size, N, D, dtype=dtype),
        torch.randn(B, *size, N, dtype=dtype),
    )


def everything(run, pattern: Pattern, x: Inputs) -> dict[str, Tensor]:
    """out, lse, and the gradients that both send to the projection and to the bias table."""
    out, lse = run(*x.views, pattern, x.bias, 0.3)
    dqkv, dbias = torch.autograd.grad((out * x.dout).sum() + (lse * x.dlse).sum(), (x.qkv, x.bias))
    return {"out": out.detach(), "lse": lse.detach(), "dqkv": dqkv, "dbias": dbias}
