"""Bilinear reading: the weight of every entry, and PyTorch's `grid_sample`, also where it has no deterministic gradient.

Points are in units in which -1 is the first of n entries and 1 the last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearness(points: Tensor, n: int) -> Tensor:
    """max(0, 1 - distance) of points `[...]` to each of `n` entries: `[..., n]`."""
    position = (points + 1) / 2 * (n - 1)
    return (1 - (position[..., None] - torch.arange(n, device=points.device)).abs()).clamp(min=0)


def slope(points: Tensor, n: int) -> Tensor:
    """The derivative of `nearness` by the points: of the two entries around, the first falls as fast as the second grows."""
    position = (points + 1) / 2 * (n - 1)
    before = position.floor()[..., None] - torch.arange(n, device=points.device)
    return ((before == -1).to(points.dtype) - (before == 0).to(points.dtype)) * ((n - 1) / 2)


def bilinear(pictures: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples with zeros beyond the corners, which lie at -1 and 1.

    On a GPU the gradient of PyTorch's `grid_sample` is summed by atomics, and under `torch.use_deterministic_algorithms` it
    raises. There the four entries around each point are gathered, and their gradient is summed in the order of a sort: it takes
    five times the memory of the samples (four gathered copies and as many indices) and sorts four indices for each.

    Args:
        pictures: `[M, C, H, W]`.
        grid: `[M, P, Q, 2]`, column first, in the dtype of pictures.

    Returns:
        `[M, C, P, Q]`.
    """
    if sums_by_atomics(pictures.device) and torch.are_deterministic_algorithms_enabled():
        return gathered(pictures, grid)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def sums_by_atomics(device: torch.device) -> bool:
    """Whether PyTorch's gradient of `grid_sample` has no order of its own there."""
    return device.type == "cuda"


def gathered(pictures: Tensor, grid: Tensor) -> Tensor:
    """The same by indexing, whose gradient has an order."""
    M, C, H, W = pictures.shape
    tokens = pictures.permute(0, 2, 3, 1).reshape(M * H * W, C)
    picture = torch.arange(M, device=grid.device)[:, None, None]
    position = [(grid[..., axis] + 1) / 2 * (n - 1) for axis, n in ((1, H), (0, W))]
    first = [p.detach().floor() for p in position]
    behind = [p - f for p, f in zip(position, first, strict=True)]
    total = pictures.new_zeros(())
    for i in (0, 1):
        for j in (0, 1):
            row, col = first[0] + i, first[1] + j
            exists = (row >= 0) & (row < H) & (col >= 0) & (col < W)
            weight = (behind[0] if i else 1 - behind[0]) * (behind[1] if j else 1 - behind[1])
            at = torch.where(exists, row * W + col, 0).long() + picture * (H * W)
            total = total + torch.where(exists, weight, 0)[..., None] * tokens[at]
    return total.movedim(-1, 1)
