"""Calls of attend with a table that is read at points: ragged maps, tables of other maps, groups, points far beyond."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.triton import attend_cases
from vitzoo.ops import PointBias


class Case(NamedTuple):
    size: tuple[int, int]
    S: int
    side: tuple[int, int]
    D: int = 16
    N: int = 2
    G: int = 1
    B: int = 1
    reach: float = 1.2
    key_bias: bool = False
    dlse: bool = True
    dtype: torch.dtype = torch.float32
    settings: dict[str, int] = {}


CASES = {
    "at points: a ragged map, the table of another": Case((13, 17), 20, (9, 11), D=24, dlse=False),
    "at points: one query, one key": Case((1, 1), 1, (3, 5), N=3, G=3),
    "at points: one row, most points beyond the map": Case((1, 9), 6, (5, 17), reach=4.0, N=1),
    "at points: keys on the tokens": Case((3, 5), 15, (5, 9), reach=0.0, N=1),
    "at points: 17 heads, in parts": Case((4, 5), 6, (7, 9), N=17, D=8, settings={"LEAST_CHUNK": 4}),
    "at points: groups, blocks and parts of the table": Case(
        (5, 6), 3, (9, 37), B=2, N=4, G=2, D=8, key_bias=True, settings={"TABLE_SIDE": 16}
    ),
    "at points: half precision": Case((7, 7), 20, (13, 13), D=32, G=2, dtype=torch.float16),
}  # fmt: skip
USUAL = {"LEAST_CHUNK": 256, "TABLE_SIDE": 64}
NAMES = ("out", "lse", "dq", "dk", "dv", "dtable", "dpoints", "dkey_bias")


def inputs(case: Case, device: str = "cpu"):
    """q, k, v, table, points, rows, cols, key_bias or None, and the gradients of out and lse."""
    H, W = case.size
    q = torch.randn(case.B, H * W, case.N, case.D, dtype=case.dtype, device=device)
    k, v = torch.randn(case.B, case.S, 2, case.N, case.D, dtype=case.dtype, device=device).unbind(2)
    table = torch.randn(case.N, *case.side, device=device)
    points = (torch.rand(case.B, case.S, case.G, 2, device=device) * 2 - 1) * case.reach
    rows, cols = (torch.linspace(-1, 1, n, device=device) for n in (H, W))
    if case.reach == 0.0:  # steps of a quarter and of a half, so that positions are exact
        points = points + torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)[:, None]
    key_bias = torch.randn(case.B, case.S, device=device) if case.key_bias else None
    dlse = torch.randn(q.shape[:3], device=device) if case.dlse else None
    return q, k, v, table, points, rows, cols, key_bias, torch.randn_like(q), dlse


def gradients(given, dtype: torch.dtype, points_dtype: torch.dtype) -> dict[str, Tensor]:
    """All results of the definition at a precision, the bias through PyTorch's `grid_sample`; scores of scale 0.3."""
    q, k, v, table, points, rows, cols, key_bias, dout, dlse = given
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    leaves += [t.detach().to(points_dtype).requires_grad_() for t in (table, points)]
    keys = None if key_bias is None else key_bias.detach().to(points_dtype).requires_grad_()
    bias = PointBias(leaves[3], leaves[4], rows.to(points_dtype), cols.to(points_dtype)).dense()
    out, lse = attend_cases.oracle(*leaves[:3], bias.to(dtype), None if keys is None else keys.to(dtype), 0.3)
    loss = (out * dout.to(dtype)).sum() + (0.0 if dlse is None else (lse * dlse.to(dtype)).sum())
    leaves += [] if keys is None else [keys]
    found = (out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves))
    return dict(zip(NAMES, found, strict=False))


def kernels(given) -> dict[str, Tensor]:
    from vitzoo.ops.attend import triton

    *tensors, dout, dlse = given
    out, lse = triton.forward_at_points(*tensors, 0.3)
    grads = triton.backward_at_points(dout, dlse, *tensors, out, lse, 0.3)
    return dict(zip(NAMES[: 8 if tensors[7] is not None else 7], (out, lse, *grads), strict=False))


def measure(case: Case) -> dict[str, float]:
    """The largest error of every result, relative to its largest value where that exceeds 1."""
    from vitzoo.ops.attend.triton import launch

    for name, usual in USUAL.items():
        setattr(launch, name, case.settings.get(name, usual))
    torch.manual_seed(0)
    given = inputs(case)
    exact = gradients(given, torch.float64, torch.float64)
    return {name: attend_cases.error(value.double(), exact[name]) for name, value in kernels(given).items()}
