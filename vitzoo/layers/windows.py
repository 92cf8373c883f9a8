"""Attention in windows with the projections of a timm layer, for the models of timm that stay as they are.

What a family of timm's adds to windows (a relative position table, a query for all of them) is an argument here; where the
windows stand in a block is the family's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.layers.linear import linear
from vitzoo.layers.maps import crop_map, pad_map
from vitzoo.ops import attend2d
from vitzoo.patterns import Pattern, window

for _name in ("attend2d", "crop_map", "pad_map", "linear", "spread"):
    torch.fx.wrap(_name)


def spread(query: Tensor, like: Tensor) -> Tensor:
    """One window's queries ``[B, h, w, N, D]`` over all windows of ``like`` ``[B, ny * h, nx * w, ...]``."""
    batch, h, w, heads, depth = query.shape
    if torch.compiler.is_compiling():  # gathered: a number of windows asks whether it is 1
        rows, cols = (torch.arange(n, device=query.device) % side for n, side in zip(like.shape[1:3], (h, w), strict=True))
        return query[:, rows[:, None], cols[None]]
    ny, nx = (like.shape[1] + h - 1) // h, (like.shape[2] + w - 1) // w
    return query[:, None, :, None].expand(batch, ny, h, nx, w, heads, depth).reshape(batch, ny * h, nx * w, heads, depth)


def turned(table: Tensor, size: tuple[int, int]) -> Tensor:
    """``[(2 h - 1)(2 w - 1), N]``, query minus key, as our ops take it: ``[N, 2 h - 1, 2 w - 1]``, key minus query."""
    h, w = size
    return table.view(2 * h - 1, 2 * w - 1, -1).permute(2, 0, 1).flip(1, 2)


class RelativeTable(nn.Module):
    """A relative position table as timm stores it, ``[(2 h - 1)(2 w - 1), N]``, query minus key; under timm's name.

    Args:
        table: the parameter.
        size: rows h and columns w of the window.
    """

    NO_DECAY = ("relative_position_bias_table",)

    def __init__(self, table: nn.Parameter, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.relative_position_bias_table = table

    def forward(self) -> Tensor:
        """As our ops take it: ``[N, 2 h - 1, 2 w - 1]``, key minus query."""
        return turned(self.relative_position_bias_table, self.size)


class WindowAttention(nn.Module):
    """``proj(softmax(q k^T / sqrt(D) + bias) v)`` inside windows of a map; tokens that it is padded with are keys.

    Args:
        theirs: timm's layer: ``qkv``, ``proj``, ``num_heads``, and ``proj_drop`` where it has one.
        pattern: a window, shifted or not.
        rel_pos: makes the bias table; None for none.

    Shape: ``[B, H, W, C]``, unchanged, any H and W.
    """

    def __init__(self, theirs: Any, pattern: Pattern, rel_pos: RelativeTable | None = None) -> None:
        super().__init__()
        self.num_heads, self.pattern = theirs.num_heads, pattern
        self.size = pattern.rows.size or 1, pattern.cols.size or 1
        self.rel_pos = rel_pos
        self.qkv, self.proj = theirs.qkv, theirs.proj
        self.proj_drop = getattr(theirs, "proj_drop", nn.Identity())

    def bias(self) -> Tensor | None:
        """The bias table ``[N, 2 h - 1, 2 w - 1]``, key minus query; None for none."""
        return None if self.rel_pos is None else self.rel_pos()

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        """``query``, ``[B, h, w, C]``: what every window asks; ``qkv`` then gives keys and values alone."""
        padded = pad_map(x, self.size)
        parts = linear(padded, self.qkv.weight, self.qkv.bias).unflatten(-1, (3 if query is None else 2, self.num_heads, -1))
        if query is None:
            q, k, v = parts.unbind(-3)
        else:
            k, v = parts.unbind(-3)
            q = spread(query.unflatten(-1, (self.num_heads, -1)), k)
        out = crop_map(attend2d(q, k, v, self.pattern, bias=self.bias()), x).flatten(-2)
        return self.proj_drop(linear(out, self.proj.weight, self.proj.bias))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, pattern={self.pattern!r}"


def plain_window(theirs: Any, size: tuple[int, int]) -> WindowAttention:
    """Windows of ``size`` without shift and without a table."""
    return WindowAttention(theirs, window(size))


class QueriedBlock(nn.Module):
    """Attention inside windows, to their own queries or to one for all, then an MLP (GC ViT); ``[B, H, W, C]``, unchanged."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = theirs.norm1, theirs.norm2, theirs.mlp
        self.ls1, self.ls2, self.drop_path1, self.drop_path2 = theirs.ls1, theirs.ls2, theirs.drop_path1, theirs.drop_path2
        size, attn = theirs.window_size, theirs.attn
        self.use_global = attn.use_global
        self.attn = WindowAttention(attn, window(size), RelativeTable(attn.rel_pos.relative_position_bias_table, size))

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        """``query``, ``[B, h, w, C]``, as large as a window."""
        y = self.attn(self.norm1(x), query if self.use_global else None)
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
