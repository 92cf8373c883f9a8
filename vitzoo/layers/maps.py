"""Padding, cropping and resizing of channels-last maps ``[B, H, W, ...]`` and of the tables that belong to them.

These are the few functions whose work depends on the size of the map. A module that calls one inside ``forward``
marks it with ``torch.fx.wrap("name")`` in its own file, so that FX keeps it as one node and a traced graph still runs
at other sizes. The arithmetic is written so that ``torch.export`` keeps H and W symbolic: a padded size is
``ceil(n / m) * m``, which divides by m; ``-n % m`` would not simplify.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded_size(n: int, multiple: int = 1, minimum: int = 1) -> int:
    """The smallest size that is at least ``n`` and ``minimum`` and, unless ``minimum`` decides, divides by ``multiple``."""
    if multiple > 1:
        n = (n + multiple - 1) // multiple * multiple
    return torch.sym_max(n, minimum) if minimum > 1 else n  # type: ignore[return-value]  # a SymInt stands for an int


def pad_map(x: Tensor, multiple: tuple[int, int] = (1, 1), minimum: tuple[int, int] = (1, 1)) -> Tensor:
    """Zero-pad a map at its bottom and right.

    Args:
        x: ``[B, H, W, C]``.
        multiple: rows and columns that the padded size must divide by.
        minimum: rows and columns that it must have at least.

    Returns:
        ``[B, H', W', C]``; ``x`` itself where nothing has to be added.
    """
    height, width = x.shape[1], x.shape[2]
    bottom = padded_size(height, multiple[0], minimum[0]) - height
    right = padded_size(width, multiple[1], minimum[1]) - width
    if not torch.compiler.is_compiling() and bottom == 0 and right == 0:
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def with_spare_cells(x: Tensor, ratio: int) -> Tensor:
    """In a captured graph ``[B, H, W, ...]`` with one more cell below and beside: PyTorch specialises a number of 1."""
    if not torch.compiler.is_compiling():
        return x
    return F.pad(x, (*(0, 0) * (x.ndim - 3), 0, ratio, 0, ratio))


def are_cells(x: Tensor, ratio: int) -> Tensor:
    """Which of the cells of ``with_spare_cells(x, ratio)`` are whole ones of ``x``: bool, row by row, in a captured graph."""
    rows, cols = (n // ratio - torch.arange(n // ratio + 1, device=x.device) for n in (x.shape[1], x.shape[2]))
    return ((rows[:, None] > 0) & (cols > 0)).flatten()


def pad_image(image: Tensor, multiple: tuple[int, int]) -> Tensor:
    """``pad_map`` for an image ``[B, C, H, W]``."""
    height, width = image.shape[2], image.shape[3]
    bottom = padded_size(height, multiple[0]) - height
    right = padded_size(width, multiple[1]) - width
    if not torch.compiler.is_compiling() and bottom == 0 and right == 0:
        return image
    return F.pad(image, (0, right, 0, bottom))


def crop_map(x: Tensor, like: Tensor) -> Tensor:
    """The top left of ``x`` ``[B, H', W', ...]`` in the size of ``like`` ``[B, H, W, ...]``: undoes ``pad_map``."""
    height, width = like.shape[1], like.shape[2]
    if torch.compiler.is_compiling():  # gathered: a slice asks whether H <= H', and what follows about its strides
        rows, cols = (torch.arange(n, device=x.device) for n in (height, width))
        return x[:, rows[:, None], cols[None]]
    if (height, width) == (x.shape[1], x.shape[2]):
        return x
    return x[:, :height, :width]


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a relative position table as a picture, bicubic, as Swin's published loader does.

    Args:
        table: ``[N, Ey, Ex]``.
        size: new Ey and Ex.

    Returns:
        ``[N, *size]`` in the table's dtype; differentiable. The table itself where it already has that size.
    """
    if not torch.compiler.is_compiling() and tuple(table.shape[1:]) == tuple(size):
        return table
    resized = F.interpolate(table[None].float(), size=size, mode="bicubic", align_corners=False)
    return resized[0].to(table.dtype)


def global_table(table: Tensor, x: Tensor) -> Tensor:
    """The relative position table ``[N, Ey, Ex]`` of a global attention, resized to the reach of the map ``x``."""
    return resize_table(table, (2 * x.shape[1] - 1, 2 * x.shape[2] - 1))


def resize_positions(
    positions: Tensor, like: Tensor, grid: tuple[int, int], antialias: bool = False, mode: str = "bicubic"
) -> Tensor:
    """Absolute positions ``[1, grid_h * grid_w, C]`` as a map of the size of ``like`` ``[B, H, W, C]``.

    Args:
        positions: learned positions, row by row.
        like: the map they will be added to.
        grid: rows and columns that ``positions`` was learned at.
        antialias: low-pass before shrinking (timm's ViT does, Swin's dense backbone does not).
        mode: "bicubic", or "bilinear" (PVT).

    Returns:
        ``[1, H, W, C]`` in the dtype of ``positions``.
    """
    height, width = like.shape[1], like.shape[2]
    if not torch.compiler.is_compiling() and (height, width) == tuple(grid):
        return positions.unflatten(1, grid)
    picture = positions.unflatten(1, grid).permute(0, 3, 1, 2).float()
    picture = F.interpolate(picture, size=(height, width), mode=mode, align_corners=False, antialias=antialias)
    return picture.permute(0, 2, 3, 1).to(positions.dtype)
