"""Attention from layer to layer as square matrices over tokens, whatever the tokens of a layer are.

A padded map is cut back, heads that several calls share out are put together, agents that gather and hand out become one
matrix, keys of a reduced map are spread over the tokens that they sum up, and between stages every token is the mean of
those that were merged into it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.explain._record import Grid, Record, token_grid


@dataclass(frozen=True)
class Step:
    """One layer: ``matrix [B, P + h * w, P + h * w]`` over prefix tokens and those of a map."""

    matrix: Tensor
    grid: Grid
    prefix: int


def steps_of(
    model: nn.Module, x: Tensor, records: Sequence[Record], weights: Sequence[Tensor], fuse: Callable[..., Tensor], *more: Any
) -> list[Step]:
    """Layers in order.

    Args:
        model: what ran.
        x: the images.
        records: its calls.
        weights: ``[B, N, L, S]`` of each.
        fuse: makes ``[B, L, S]`` of the weights of one call, all heads together.
        *more: further lists of tensors like the weights, which ``fuse`` takes as well (gradients).

    Returns:
        One step for each module that attends.

    Raises:
        ValueError: a layer whose queries or keys are not the tokens of its map.
    """
    steps = []
    for _, group in groupby(zip(records, weights, *more, strict=True), key=lambda entry: entry[0].name):
        steps.append(_step(model, x, list(group), fuse))
    return steps


def _step(model: nn.Module, x: Tensor, calls: list[tuple], fuse: Callable[..., Tensor]) -> Step:
    record = calls[-1][0]  # its queries are the layer's tokens
    parts: list[list[Tensor]] = []
    for _, *tensors in calls:
        if parts and tensors[0].shape[2:] == parts[-1][0].shape[2:]:  # another share of the heads
            parts[-1] = [torch.cat(pair, dim=1) for pair in zip(parts[-1], tensors, strict=True)]
        else:
            parts.append(tensors)
    fused = [fuse(*tensors) for tensors in parts]
    matrix = fused[0]
    for following in fused[1:]:
        if following.shape[2] != matrix.shape[1]:
            raise ValueError(
                f"{record.name} attends from {following.shape[1]} to {following.shape[2]} tokens after it did from "
                f"{matrix.shape[1]} to {matrix.shape[2]}: how the two belong together is not known."
            )
        matrix = following @ matrix  # agents: what they have gathered is handed out
    if record.padded is not None:
        grid, prefix = record.grid or record.padded, 0
        if grid != record.padded:
            matrix = _cut(_cut(matrix, grid, record.padded, 1), grid, record.padded, 2)
        return Step(matrix, grid, prefix)
    length = matrix.shape[1]
    if record.grid is None:
        grid, prefix = token_grid(model, x, length)
    else:
        grid, prefix = record.grid, length - record.grid[0] * record.grid[1]
    if matrix.shape[2] != length:
        matrix = matrix @ _spread(record.name, matrix, grid, prefix)
    return Step(matrix, grid, prefix)


def _cut(matrix: Tensor, grid: Grid, padded: Grid, dim: int) -> Tensor:
    """The tokens of a map among those that it was padded to, along one dimension."""
    rows, cols = (torch.arange(n, device=matrix.device) for n in grid)
    return matrix.index_select(dim, (rows[:, None] * padded[1] + cols).flatten())


def _spread(name: str, matrix: Tensor, grid: Grid, prefix: int) -> Tensor:
    """``[S, L]``: how the keys of a smaller map fall on the tokens of the map, equally on those of a cell."""
    keys = matrix.shape[2]
    for rate in range(2, max(grid) + 1):
        for small in shrunk(grid, rate):
            if small[0] * small[1] == keys and prefix == 0:
                return means(grid, small, matrix)
    raise ValueError(
        f"{name} attends to {keys} keys that are not the {grid[0]} x {grid[1]} tokens of its map, nor those of a smaller one, "
        "so what it takes cannot be followed back. attention_maps shows the layer itself."
    )


def shrunk(grid: Grid, rate: int) -> tuple[Grid, Grid]:
    """A map at ``1 / rate`` of its size, rounded up and rounded down."""
    return (-(-grid[0] // rate), -(-grid[1] // rate)), (grid[0] // rate, grid[1] // rate)


def means(grid: Grid, small: Grid, like: Tensor) -> Tensor:
    """``[h' w', h w]``: each token of a smaller map as the mean of the cell that it stands for; rows sum to one.

    Where rounding down has left rows or columns out, no cell holds them.
    """
    rate = next((r for r in range(1, max(grid) + 1) if small in shrunk(grid, r)), 0)
    axes = []
    for n, cells in zip(grid, small, strict=True):
        place = torch.arange(n, device=like.device) // (rate or -(-n // cells))
        members = (place == torch.arange(cells, device=like.device)[:, None]).to(like.dtype)
        axes.append(members / members.sum(dim=1, keepdim=True).clamp(min=1))
    return torch.kron(axes[0], axes[1])


def follow(model: Any, steps: Sequence[Step], through: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """From the output back to the tokens of the first step.

    Args:
        model: says by ``global_pool`` whether its class token is the output; else the mean of the map is.
        steps: layers in order.
        through: from what the tokens behind a layer count, ``[B, 1, L]``, and its matrix to what those before it count.

    Returns:
        ``[B, h, w]``.
    """
    last = steps[-1]
    first = getattr(model, "global_pool", "token") == "token" and last.prefix > 0
    row = last.matrix.new_zeros(len(last.matrix), 1, last.matrix.shape[1])
    if first:
        row[..., 0] = 1
    else:
        row[..., last.prefix :] = 1 / (last.grid[0] * last.grid[1])
    for i in reversed(range(len(steps))):
        step = steps[i]
        if i + 1 < len(steps) and steps[i + 1].grid != step.grid:
            merged = means(step.grid, steps[i + 1].grid, row)
            row = row[..., steps[i + 1].prefix :] @ merged
            row = torch.cat([row.new_zeros(len(row), 1, step.prefix), row], dim=-1)
        elif i + 1 < len(steps) and steps[i + 1].prefix != step.prefix:
            row = row[..., max(steps[i + 1].prefix - step.prefix, 0) :]
        row = through(row, step.matrix)
    return row[:, 0, steps[0].prefix :].unflatten(1, steps[0].grid)
