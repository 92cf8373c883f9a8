"""The ops against other ways to compute the same: time, bytes, FLOPs and memory of one call, forward and backward.

An op whose result is wrong is not timed. A way that cannot run a case says why in the table.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitzoo.bench.baselines import unfolded_neighborhood
from vitzoo.bench.calls import OpResult, Way, refuse_wrong, timed
from vitzoo.ops import attend2d, using
from vitzoo.patterns import Pattern, grid, halo, neighborhood, stripe, window

CHECKED_MAP = 61, 67
"""Rows and columns of the largest map on which a case is checked; the definition holds every pair of tokens."""


@dataclass(frozen=True)
class OpCase:
    """One row: ``attend2d`` along a pattern.

    Attributes:
        pattern: who sees whom.
        batch: images.
        size: rows and columns of the map.
        heads: heads.
        head_dim: channels of a head.
        bias: with a trained table.
    """

    pattern: Pattern
    batch: int
    size: tuple[int, int]
    heads: int = 3
    head_dim: int = 32
    bias: bool = True

    def __str__(self) -> str:
        bias = "" if self.bias else ", no bias"
        return f"{self.pattern!r}, {self.batch} x {self.size[0]} x {self.size[1]}, {self.heads} x {self.head_dim}{bias}"


GPU_CASES = (
    OpCase(window(7), 256, (56, 56)),
    OpCase(window(7, shift=3), 256, (56, 56)),
    OpCase(window(7, shift=3), 256, (28, 28), heads=6),
    OpCase(window(12, shift=6), 64, (96, 96), heads=4),
    OpCase(grid(7), 256, (56, 56)),
    OpCase(stripe(rows=7), 256, (56, 56)),
    OpCase(halo(8, 3), 256, (56, 56)),
    OpCase(neighborhood(7), 256, (56, 56), bias=False),
    OpCase(neighborhood(7), 256, (56, 56)),
    OpCase(neighborhood(7, dilation=8), 256, (56, 56)),
    OpCase(neighborhood(7), 3, (512, 512)),
    OpCase(neighborhood(13), 64, (56, 56)),
)
CPU_CASES = (
    OpCase(window(7), 8, (56, 56)),
    OpCase(window(7, shift=3), 8, (56, 56)),
    OpCase(grid(7), 8, (56, 56)),
    OpCase(stripe(rows=7), 8, (56, 56)),
    OpCase(halo(8, 3), 8, (56, 56)),
    OpCase(neighborhood(7), 8, (56, 56)),
    OpCase(neighborhood(7, dilation=8), 8, (56, 56)),
)
"""What ``python -m vitzoo.bench ops`` runs on a CPU."""


def _ours(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, impl: str | None) -> Tensor:
    return attend2d(q, k, v, pattern, bias=bias, impl=impl)


def _unfold(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    rows = pattern.rows
    if rows != pattern.cols or rows.edge != "clamp" or rows.stride != 1 or rows.size is None or rows.step is None:
        raise ValueError("an unfold is written for square neighborhoods of stride 1.")
    table = q.new_zeros(q.shape[3], 2 * rows.size - 1, 2 * rows.size - 1) if bias is None else bias
    return unfolded_neighborhood(q, k, v, table, rows.size, rows.step)


def _flex(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """FlexAttention compiled with the same pattern as its block mask and the same table as its score."""
    if not q.is_cuda:
        raise ValueError("FlexAttention is measured on a GPU.")
    run, mask, (row, col) = _flex_parts(pattern, q.shape[1], q.shape[2], q.device)
    tokens = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    score = None
    if bias is not None:
        flat, width = bias.flatten(1), bias.shape[2]
        center = (bias.shape[1] // 2) * width + width // 2

        def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s + flat[h, center + (row[j] - row[i]) * width + col[j] - col[i]]

    return run(*tokens, score_mod=score, block_mask=mask).transpose(1, 2).unflatten(1, q.shape[1:3])


_FLEX: dict[Any, Any] = {}


def _flex_parts(pattern: Pattern, height: int, width: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    key = (pattern, height, width, device)
    if key not in _FLEX:
        axes = []
        for span, n in ((pattern.rows, height), (pattern.cols, width)):
            resolved = span.resolve(n)
            keys = [resolved.keys(i, n) for i in range(n)]
            axes.append(
                (
                    torch.tensor([r.start for r in keys], device=device),
                    torch.tensor([r.stop for r in keys], device=device),
                    torch.arange(n, device=device) % (resolved.step or 1),
                    torch.arange(n, device=device) // (resolved.step or 1),
                )
            )
        (y0, y1, ry, my), (x0, x1, rx, mx) = axes

        def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
            yi, xi, yj, xj = i // width, i % width, j // width, j % width
            rows = (yj >= y0[yi]) & (yj < y1[yi]) & (ry[yi] == ry[yj])
            return rows & (xj >= x0[xi]) & (xj < x1[xi]) & (rx[xi] == rx[xj])

        n = height * width
        token = torch.arange(n, device=device)
        mask = torch.compile(create_block_mask)(sees, None, None, n, n, device=device)
        _FLEX[key] = torch.compile(flex_attention), mask, (my[token // width], mx[token % width])
    return _FLEX[key]


def _natten(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    if importlib.util.find_spec("natten") is None:
        raise ValueError("NATTEN is not installed.")
    if bias is not None:
        raise ValueError("NATTEN takes no position bias since 0.20.")
    rows, cols = pattern.rows, pattern.cols
    if rows.edge != "clamp":
        raise ValueError("NATTEN computes neighborhoods only.")
    from natten import na2d  # type: ignore[import-not-found]

    return na2d(q, k, v, kernel_size=(rows.size, cols.size), dilation=(rows.step, cols.step), stride=(rows.stride, cols.stride))


def _sdpa_with_bias(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """Windows copied out, SDPA with the table spread to a bias tensor, windows copied back: what people write by hand."""
    size, n = pattern.rows.size, q.shape[1]
    plain = pattern == window(size or 1)
    if not plain or size is None or n % size or q.shape[2] % size:
        raise ValueError("SDPA with a bias tensor is written for unshifted square windows that divide the map.")
    batch, height, width, heads, dim = q.shape
    parts = [
        t.view(batch, height // size, size, width // size, size, heads, dim)
        .permute(0, 1, 3, 5, 2, 4, 6)
        .flatten(4, 5)
        .flatten(0, 2)
        for t in (q, k, v)
    ]
    mask = None
    if bias is not None:
        at = torch.arange(size, device=q.device)
        offset = at[None, :] - at[:, None] + size - 1  # key minus query
        spread = bias[:, offset[:, None, :, None], offset[None, :, None, :]]  # [N, query row, query col, key row, key col]
        mask = spread.reshape(heads, size * size, size * size).to(q.dtype)
    out = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=mask)
    out = out.view(batch, height // size, width // size, heads, size, size, dim).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, height, width, heads, dim)


def ways(device: torch.device) -> dict[str, Way]:
    """Every way to compute ``attend2d``, ours first."""
    first = {"triton": partial(_ours, impl="triton")} if device.type == "cuda" else {}
    return {
        **first,
        "pytorch": partial(_ours, impl="sdpa"),
        "sdpa + bias": _sdpa_with_bias,
        "unfold": _unfold,
        "flex": _flex,
        "natten": _natten,
    }


def _inputs(case: OpCase, size: tuple[int, int], batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    packed = torch.randn(batch, *size, 3, case.heads, case.head_dim, device=device, dtype=dtype, requires_grad=True)
    reach_y, reach_x = case.pattern.reach(*size)
    table = torch.randn(case.heads, 2 * reach_y + 1, 2 * reach_x + 1, device=device, requires_grad=True) if case.bias else None
    return packed, table, torch.randn(batch, *size, case.heads, case.head_dim, device=device, dtype=dtype)


def error_of(way: Way, case: OpCase, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of outputs and gradients from the definition in fp64, over the definition's largest value."""
    size = (min(case.size[0], CHECKED_MAP[0]), min(case.size[1], CHECKED_MAP[1])) if max(case.size) > 64 else case.size
    packed, table, cotangent = _inputs(case, size, 1, device, dtype)

    def everything(run: Way, to: torch.dtype) -> list[Tensor]:
        x = packed.detach().to(to).requires_grad_()
        t = None if table is None else table.detach().to(torch.promote_types(to, torch.float32)).requires_grad_()
        out = run(*x.unbind(3), case.pattern, t)
        out.backward(cotangent.to(to))
        return [r.detach().double() for r in (out, x.grad, *([] if t is None else [t.grad])) if r is not None]

    with using("reference"):
        exact = everything(partial(_ours, impl=None), torch.float64)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(everything(way, dtype), exact, strict=True))


def measure(case: OpCase, device: torch.device, dtype: torch.dtype, rounds: int = 9) -> OpResult:
    """Check ours, then time every way that takes the case.

    Args:
        case: what to measure.
        device: where.
        dtype: of q, k and v.
        rounds: interleaved rounds.

    Returns:
        The measured row.

    Raises:
        RuntimeError: our result is off by more than the dtype allows: nothing is timed.
    """
    candidates = ways(device)
    mine = next(iter(candidates))
    error = error_of(candidates[mine], case, device, dtype)
    refuse_wrong(f"{case}: {mine}", error, dtype)
    sets = []
    for _ in range(3 if device.type == "cuda" else 1):
        packed, table, cotangent = _inputs(case, case.size, case.batch, device, dtype)
        sets.append(([packed] if table is None else [packed, table], cotangent))

    def call(way: Way, packed: Tensor, table: Tensor | None = None) -> Tensor:
        return way(*packed.unbind(3), case.pattern, table)

    tokens = case.batch * case.size[0] * case.size[1] * case.heads
    moved = tokens * case.head_dim * dtype.itemsize
    flops = 4 * case.batch * case.heads * case.head_dim * case.pattern.pairs(*case.size)
    reads = (4 * moved + 4 * tokens, 8 * moved + 8 * tokens)  # q k v out lse; q k v out dout, dq dk dv, lse and delta
    return timed(case, error, candidates, call, sets, reads, (flops, 2.5 * flops), rounds)
