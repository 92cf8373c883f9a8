"""Agent attention: a few pooled queries read the whole map, and every token reads them. Han et al. 2024, arXiv:2312.08874.

Two softmax attentions in a row, each linear in the number of tokens, stand in for one that is quadratic (the paper's
equations 4 to 6). Pooling and biases are products with small matrices built from ``arange``, except in eager mode on a CPU:
they hold for symbolic sizes too, and their backward pass gives the same bits every time, which PyTorch's own operators for
both do not on a GPU.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import MixedAttention
from vitzoo.layers.conv import DepthwiseConv
from vitzoo.layers.mixers import Slot, register_mixer
from vitzoo.ops import attend

for _name in ("attend", "map_bias", "pool_map"):
    torch.fx.wrap(_name)

SIDE = 7
"""Rows and columns of the coarse bias tables, whatever the map."""


def pool_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Means of a map over the cells of a grid.

    The cells are those of ``adaptive_avg_pool2d``: they overlap where the map does not divide, and repeat where it is
    smaller than the grid.

    Args:
        x: ``[B, H, W, C]``; any strides with C contiguous.
        grid: rows and columns of cells.

    Returns:
        ``[B, grid[0] * grid[1], C]``.
    """
    if _eager_on_cpu(x):
        return F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
    members, count = _cells(x.shape[2], grid[1], x)
    x = (members @ x) / count
    members, count = _cells(x.shape[1], grid[0], x)
    return ((members @ x.flatten(2)) / count).unflatten(2, (grid[1], x.shape[3])).flatten(1, 2)


def _cells(n: int, cells: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Who belongs to which cell, ``[cells, n]`` of 0 and 1 (exact in every precision), and how many do, ``[cells, 1]``."""
    first = torch.arange(cells, device=like.device)[:, None] * n
    start, end = first // cells, (first + n + cells - 1) // cells
    place = torch.arange(n, device=like.device)
    return ((place >= start) & (place < end)).to(like.dtype), (end - start).to(like.dtype)


def map_bias(coarse: Tensor, row: Tensor, col: Tensor, like: Tensor, grid: tuple[int, int]) -> Tensor:
    """The bias between agents and the places of a map.

    The coarse table is resized to the map, the row and column terms to its rows and columns, and all three from the
    square of agents that they were learned with to ``grid``; bilinear, as in the published dense backbones. Each step is
    linear along axes of its own, so the agents come first here, where that is cheap.

    Args:
        coarse: ``[N, A, 7, 7]``.
        row: ``[N, A, H0]``, a term for each row of the map that it was learned at.
        col: ``[N, A, W0]``, likewise for columns.
        like: the map at hand, ``[B, H, W, ...]``.
        grid: rows and columns of the agents at hand.

    Returns:
        ``[N, grid[0] * grid[1], H * W]``.
    """
    side = math.isqrt(row.shape[1])
    if grid != (side, side):
        agents = torch.kron(_linear(grid[0], side, row), _linear(grid[1], side, row))
        coarse, row, col = agents @ coarse.flatten(2), agents @ row, agents @ col
        coarse = coarse.unflatten(2, (SIDE, SIDE))
    height, width = like.shape[1], like.shape[2]
    if _eager_on_cpu(coarse):
        fine = F.interpolate(coarse, size=(height, width), mode="bilinear")
    else:
        fine = _linear(height, SIDE, coarse) @ (coarse @ _linear(width, SIDE, coarse).T)
    return (fine + _resize(row, height)[..., None] + _resize(col, width)[..., None, :]).flatten(2)


def _eager_on_cpu(x: Tensor) -> bool:
    """Where PyTorch's own pooling and resizing are the fastest, and as reproducible as products of matrices."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _linear(size: int, n: int, like: Tensor) -> Tensor:
    """``[size, n]``: resizes ``n`` samples to ``size``, linear, pixels as areas, the outermost repeated."""
    wide = torch.promote_types(like.dtype, torch.float32)
    target, source = (torch.arange(m, device=like.device, dtype=wide) for m in (size, n))
    position = ((target + 0.5) * n / size - 0.5).clamp(min=0)
    position = position.minimum(source[-1])
    return (1 - (position[:, None] - source).abs()).clamp(min=0).to(like.dtype)


def _resize(line: Tensor, size: int) -> Tensor:
    """``[N, A, n]`` to ``[N, A, size]``; itself where it has that size."""
    if not torch.compiler.is_compiling() and line.shape[2] == size:
        return line
    return line @ _linear(size, line.shape[2], line).T


@register_mixer("agent", prefix=True)
class AgentAttention(MixedAttention):
    """Agent attention: ``softmax(q a^T + B2) softmax(a k^T + B1) v``, plus a depthwise 3x3 convolution of v.

    The agents ``a`` are means of q over a grid of cells; both products are scaled by D ** -0.5. Each bias is a 7x7 table
    resized to the map, plus a term for every row and one for every column. Prefix tokens are keys and queries with a
    learned bias of their own, and no part of the pooling and of the convolution. Where the host convolves v itself
    (CSWin's LePE), that convolution is the one.

    Args:
        slot: the place it is built for.
        agents: how many agents the tables are for, a square number.
        agent_shape: rows and columns of the agents in use, where they are not that square: published dense backbones use
            more than they were trained with. The biases are resized to it.
        kv_ratio: k and v come from cells of ``kv_ratio`` x ``kv_ratio`` tokens. The host's own ratio is not taken:
            agents are there to make it needless.

    Raises:
        ValueError: ``agents`` is no square number; a ``kv_ratio`` beside prefix tokens.

    Shape: ``[B, H, W, C]``, unchanged, any H and W; ``[B, P + H * W, C]`` in ``forward_tokens``.
    """

    NO_DECAY: ClassVar[tuple[str, ...]] = tuple(f"{of}_bias" for of in ("an", "ah", "aw", "ac", "na", "ha", "wa", "ca"))

    def __init__(self, slot: Slot, *, agents: int = 49, agent_shape: tuple[int, int] | None = None, kv_ratio: int = 1) -> None:
        side = math.isqrt(agents)
        if side * side != agents:
            raise ValueError(
                f"{agents} agents do not fill a square: take {side**2} or {(side + 1) ** 2}, and agent_shape for a rectangle."
            )
        super().__init__(
            slot.dim,
            slot.num_heads,
            packed=slot.packed,
            kv_ratio=kv_ratio,
            lepe=slot.lepe,
            prefix_tokens=slot.prefix_tokens,
            qkv_bias=slot.qkv_bias,
            proj_drop=slot.proj_drop,
        )
        self.grid = (side, side) if agent_shape is None else agent_shape
        self.dwc = None if slot.lepe else DepthwiseConv(slot.dim)
        heads, prefix, (height, width) = slot.num_heads, slot.prefix_tokens, slot.map_size
        key_height, key_width = -(-height // kv_ratio), -(-width // kv_ratio)
        self.an_bias = nn.Parameter(torch.empty(heads, agents, SIDE, SIDE))
        self.ah_bias = nn.Parameter(torch.empty(1, heads, agents, key_height, 1))
        self.aw_bias = nn.Parameter(torch.empty(1, heads, agents, 1, key_width))
        self.ac_bias = nn.Parameter(torch.empty(1, heads, agents, prefix)) if prefix else None
        self.na_bias = nn.Parameter(torch.empty(heads, agents, SIDE, SIDE))
        self.ha_bias = nn.Parameter(torch.empty(1, heads, height, 1, agents))
        self.wa_bias = nn.Parameter(torch.empty(1, heads, 1, width, agents))
        self.ca_bias = nn.Parameter(torch.empty(1, heads, prefix, agents)) if prefix else None
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal 0.02 for the bias tables."""
        for name in self.NO_DECAY:
            table = getattr(self, name)
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    def resize_state(self, value: Tensor) -> Tensor:
        """A checkpoint's row or column terms of another map as ours, linearly, as published; anything else as it is."""
        for table, axis in ((self.ah_bias, 3), (self.aw_bias, 4), (self.ha_bias, 2), (self.wa_bias, 3)):
            if value.ndim == 5 and all(value.shape[i] == n for i, n in enumerate(table.shape) if i != axis):
                weights = _linear(table.shape[axis], value.shape[axis], value)
                return (value.movedim(axis, -1) @ weights.T).movedim(-1, axis)
        return value

    def key_bias(self, like: Tensor) -> Tensor:
        """B1 for keys on the map ``like`` ``[B, h, w, ...]``: ``[N, A, h * w]``."""
        return map_bias(self.an_bias, self.ah_bias[0, ..., 0], self.aw_bias[0, :, :, 0], like, self.grid)

    def query_bias(self, like: Tensor) -> Tensor:
        """B2 for queries on the map ``like`` ``[B, H, W, ...]``: ``[N, H * W, A]``."""
        row, col = self.ha_bias[0, :, :, 0].transpose(1, 2), self.wa_bias[0, :, 0].transpose(1, 2)
        return map_bias(self.na_bias, row, col, like, self.grid).transpose(1, 2)

    def heads(self, x: Tensor) -> Tensor:
        """``[B, L, C]`` to ``[B, L, N, D]``."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        agents = self.heads(pool_map(q, self.grid))
        read = attend(agents, self.heads(k.flatten(1, 2)), self.heads(v.flatten(1, 2)), bias=self.key_bias(k))
        out = attend(self.heads(q.flatten(1, 2)), agents, read, bias=self.query_bias(q))
        return out.reshape(q.shape)

    def mix_tokens(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        patches = q[:, self.prefix_tokens :].unflatten(1, (height, width))
        agents = self.heads(pool_map(patches, self.grid))
        key_bias, query_bias = self.key_bias(patches), self.query_bias(patches)
        if self.ac_bias is not None and self.ca_bias is not None:
            key_bias = torch.cat([self.ac_bias[0], key_bias], dim=2)
            query_bias = torch.cat([self.ca_bias[0], query_bias], dim=1)
        read = attend(agents, self.heads(k), self.heads(v), bias=key_bias)
        return attend(self.heads(q), agents, read, bias=query_bias).flatten(-2)

    def local(self, v: Tensor) -> Tensor | None:
        return super().local(v) if self.dwc is None else self.dwc(v)
