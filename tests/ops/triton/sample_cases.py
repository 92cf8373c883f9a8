"""Calls of sample2d for the interpreter: points beyond the map and on its tokens, ragged maps, groups of any width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.triton.attend_cases import error


class Case(NamedTuple):
    size: tuple[int, int]
    S: int = 9
    G: int = 3
    C: int = 16
    B: int = 2
    reach: float = 1.3
    dtype: torch.dtype = torch.float32
    strided: bool = False


CASES = {
    "sample2d: a ragged map, channels that fill no block": Case((13, 17), 49, C=24, G=2, B=1),
    "sample2d: one token": Case((1, 1), 3, C=8),
    "sample2d: one row": Case((1, 9), 1, G=1),
    "sample2d: far beyond the map": Case((6, 5), 40, reach=1e9),
    "sample2d: points on tokens, at the corners too": Case((5, 5), 25, reach=0.0),
    "sample2d: 17 groups, a map and points by strides": Case((4, 7), 5, G=17, C=20, B=1, strided=True),
    "sample2d: more channels than a block": Case((9, 12), 33, G=1, C=150, B=1),
    "sample2d: more tokens than a tile, points far from most": Case((20, 9), 70, G=1, C=8, B=1),
    "sample2d: half precision": Case((7, 6), 12, C=32, dtype=torch.float16),
}  # fmt: skip


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, points (fp32) and the gradient of the output."""
    x = torch.randn(case.B, *case.size, case.G, case.C, dtype=case.dtype, device=device)
    points = (torch.rand(case.B, case.S, case.G, 2, device=device) * 2 - 1) * case.reach
    if case.reach == 0.0:  # a power of two steps, so that positions are exact
        steps = torch.linspace(-1, 1, case.size[0], device=device)
        points = points + torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).flatten(0, 1)[:, None]
    dout = torch.randn(case.B, case.S, case.G, case.C, dtype=case.dtype, device=device)
    if case.strided:
        x = torch.cat((x, x), 2)[:, :, : case.size[1]]
        points = points.transpose(1, 2).contiguous().transpose(1, 2)
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
    return x, points, dout


def oracle(x: Tensor, points: Tensor) -> Tensor:
    """The four tokens around each point, in the dtype of the inputs; its gradient is that of the cell behind the point."""
    B, H, W, G, _ = x.shape
    position = [(points[..., axis] + 1) / 2 * (n - 1) for axis, n in ((0, H), (1, W))]
    first = [p.detach().floor() for p in position]
    image, group = torch.arange(B, device=x.device)[:, None, None], torch.arange(G, device=x.device)
    total = 0
    for corner in range(4):
        down, right = corner // 2, corner % 2
        row, col = first[0] + down, first[1] + right
        exists = (row >= 0) & (row < H) & (col >= 0) & (col < W)
        weight = ((position[0] - first[0]) if down else 1 - (position[0] - first[0])) * (
            (position[1] - first[1]) if right else 1 - (position[1] - first[1])
        )
        token = x[image, torch.where(exists, row, 0).long(), torch.where(exists, col, 0).long(), group]
        total = total + torch.where(exists, weight, 0)[..., None] * token
    return total


def gradients(x: Tensor, points: Tensor, dout: Tensor, dtype: torch.dtype, points_dtype: torch.dtype) -> dict[str, Tensor]:
    """What `oracle` gives at a precision: out, dx and dpoints."""
    leaves = x.detach().to(dtype).requires_grad_(), points.detach().to(points_dtype).requires_grad_()
    out = oracle(*leaves).to(dtype)
    dx, dpoints = torch.autograd.grad((out * dout.to(dtype)).sum(), leaves)
    return {"out": out.detach(), "dx": dx, "dpoints": dpoints}


def kernels(x: Tensor, points: Tensor, dout: Tensor) -> dict[str, Tensor]:
    from vitzoo.ops.sample2d import triton

    return dict(zip(("out", "dx", "dpoints"), (triton.forward(x, points), *triton.backward(dout, x, points)), strict=True))


def measure(case: Case) -> dict[str, float]:
    """The largest error of every result, relative to its largest value where that exceeds 1."""
    torch.manual_seed(0)
    given = inputs(case)
    exact = gradients(*given, torch.float64, torch.float64)
    return {name: error(value.double(), exact[name]) for name, value in kernels(*given).items()}
