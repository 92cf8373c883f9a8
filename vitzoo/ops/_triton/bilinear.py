"""Positions between the entries of a grid, along one axis.

Entries lie at 0 .. n - 1 and weigh in by how near they are; beyond them lie zeros. A position exactly on an entry counts to the
cell behind it, which decides its gradient, as in PyTorch's `grid_sample`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def position_of(point, n):
    """Where a point lies among n entries: -1 means the first and 1 the last. Far beyond them all places are alike."""
    position = (point + 1.0) * 0.5 * (n - 1)
    return tl.minimum(tl.maximum(position, -2.0), n + 1.0)  # fits an integer, whatever the point


@triton.jit
def cell_of(position):
    """(the entry before a position, how far behind it the position lies, from 0 to 1)."""
    first = tl.floor(position)
    return first.to(tl.int32), position - first


@triton.jit
def nearness(position, entry):
    """The weight of an entry: 1 at its place, 0 from a distance of 1 on."""
    return tl.maximum(1.0 - tl.abs(position - entry), 0.0)


@triton.jit
def inside_grid(row, col, height, width):
    """Whether an entry exists."""
    return (row >= 0) & (row < height) & (col >= 0) & (col < width)
