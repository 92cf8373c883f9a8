"""Deformable attention: every query sees the same few keys, read from the map at points that the queries choose.

Xia et al. 2022, arXiv:2201.00520 (DAT); Xia et al. 2023, arXiv:2309.01430 (DAT++). Positions are pairs (row, column) in units
in which -1 is the centre of the first row or column and 1 that of the last, in at least fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads
from vitzoo.layers.conv import DepthwiseConv
from vitzoo.layers.linear import Linear
from vitzoo.layers.maps import pad_map
from vitzoo.layers.mixers import Slot, register_mixer
from vitzoo.ops import PointBias, attend, sample2d

for _name in ("attend", "fixed_bias", "log_displacements", "pad_map", "place_points", "point_bias", "sample2d"):
    torch.fx.wrap(_name)

BIASES = ("table", "mlp", "fixed", "conv", "none")


# -- positions ------------------------------------------------------------------------------------------------------


def steps(n: int) -> int:
    """Steps from the first to the last of ``n`` coordinates, and 1 where there is one coordinate; ``n`` may be symbolic."""
    return n - 1 + 1 // n


def reference_axis(n: int, version: int, like: Tensor) -> Tensor:
    """Where ``n`` samples of an axis lie before they move: ``[n]``.

    Version 2 divides half-pixel positions by n - 1, so that the last one lies beyond the map. Published weights count on it.
    """
    halves = torch.arange(n, device=like.device, dtype=like.dtype) + 0.5
    return halves / (n if version == 1 else steps(n)) * 2 - 1


def query_axis(n: int, version: int, like: Tensor) -> Tensor:
    """Where the bias takes the ``n`` queries of an axis to be: ``[n]``. Version 1 means half pixels, version 2 centres."""
    if version == 1:
        return reference_axis(n, 1, like)
    if torch.compiler.is_compiling():  # linspace fixes n in a graph
        return torch.arange(n, device=like.device, dtype=like.dtype) / steps(n) * 2 - (1 - 1 // n)
    return torch.linspace(-1, 1, n, device=like.device, dtype=like.dtype) + 1 // n  # one alone: in the middle


def place_points(offsets: Tensor, offset_range: float, version: int) -> Tensor:
    """Sampling points from what the offset network says.

    Args:
        offsets: ``[B, Hk, Wk, G, 2]`` (images, rows and columns of samples, groups), of any floating dtype.
        offset_range: how far a sample may move, in samples; negative: without limit, but not beyond the map.
        version: 1 or 2, see ``DeformableAttention``.

    Returns:
        ``[B, Hk, Wk, G, 2]``, at least fp32.
    """
    sizes = offsets.shape[1:3]
    # contiguous: a graph's shapes stay symbolic where no order of strides has to be found
    offsets = offsets.to(torch.promote_types(offsets.dtype, torch.float32)).movedim(-1, 0).contiguous()
    moved = []
    for offset, n, shape in zip(offsets, sizes, ((-1, 1, 1), (-1, 1)), strict=True):
        reference = reference_axis(n, version, offset).view(shape)
        if offset_range > 0 or (offset_range == 0 and version == 2):
            offset = offset.tanh() * (offset_range / (n if version == 1 else steps(n)))
        position = reference + offset
        if offset_range < 0:
            position = position.tanh() if version == 1 else position.clamp(-1, 1)
        moved.append(position)
    return torch.stack(moved, dim=-1)


def displacements(x: Tensor, points: Tensor, version: int) -> tuple[Tensor, Tensor]:
    """Query minus sample along the rows ``[B, G, H, S]`` and the columns ``[B, G, W, S]``, for a map ``x`` ``[B, H, W, C]``."""
    rows, cols = points.flatten(1, 2).permute(3, 0, 2, 1).contiguous()
    queries = [query_axis(n, version, points)[:, None] for n in (x.shape[1], x.shape[2])]
    return queries[0] - rows[:, :, None], queries[1] - cols[:, :, None]


def all_pairs(rows: Tensor, cols: Tensor, first: str) -> Tensor:
    """Displacements of all pairs, ``[B, G, H * W, S, 2]``, with the "row" or the "column" first."""
    H, W = rows.shape[2], cols.shape[2]
    rows, cols = rows[:, :, :, None].expand(-1, -1, -1, W, -1), cols[:, :, None].expand(-1, -1, H, -1, -1)
    return torch.stack((rows, cols) if first == "row" else (cols, rows), dim=-1).flatten(2, 3)


# -- biases ---------------------------------------------------------------------------------------------------------


def point_bias(table: Tensor, x: Tensor, points: Tensor, version: int) -> PointBias:
    """The bias of every query and sample, read bilinearly from a relative position table; zeros beyond it.

    A table for a map of Hq x Wq has an entry for every difference of two of its tokens. Differences are taken in units of
    the map, so that the table serves maps of all sizes.

    Args:
        table: ``[N, 2 Hq - 1, 2 Wq - 1]``, sample minus query.
        x: the map ``[B, H, W, C]`` whose tokens are the queries.
        points: ``[B, Hk, Wk, G, 2]``; N divides by G, and the heads of a group share its points.
        version: 1 or 2, see ``DeformableAttention``.

    Returns:
        What ``attend`` takes as its bias; differentiable in ``table`` and ``points``.
    """
    rows, cols = (query_axis(n, version, points) for n in (x.shape[1], x.shape[2]))
    return PointBias(table, points.flatten(1, 2), rows, cols)


def table_bias(table: Tensor, x: Tensor, points: Tensor, version: int) -> Tensor:
    """``point_bias`` for all pairs: ``[B, N, H * W, Hk * Wk]`` in the dtype of ``points``."""
    return point_bias(table, x, points, version).dense()


def log_displacements(x: Tensor, points: Tensor, version: int) -> Tensor:
    """Query minus sample on a logarithmic scale, what Swin V2 feeds to its position MLP: ``[B, G, H * W, S, 2]``."""
    rows, cols = displacements(x, points, version)
    t = 4 * all_pairs(rows, cols, first="row")
    return t.sign() * torch.log2(t.abs() + 1) / 3


def fixed_bias(table: Tensor, x: Tensor, points: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """A bias for every query and sample wherever it moves, ``[1, N, H * W, Hk * Wk]``.

    Args:
        table: ``[N, Hq * Wq, Hs * Ws]``, learned at ``sizes`` (Hq, Wq, Hs, Ws); resized bilinearly to other sizes.
        x: the map ``[B, H, W, C]`` whose tokens are the queries.
        points: ``[B, Hk, Wk, G, 2]``.
        sizes: see ``table``.

    Returns:
        The bias in the dtype of ``table``.
    """
    wanted = (x.shape[1], x.shape[2], points.shape[1], points.shape[2])
    if not torch.compiler.is_compiling() and wanted == tuple(sizes):
        return table[None]
    heads, wide = table.shape[0], torch.promote_types(table.dtype, torch.float32)
    by_sample = table.to(wide).unflatten(1, sizes[:2]).permute(0, 3, 1, 2)
    by_sample = F.interpolate(by_sample, size=wanted[:2], mode="bilinear").flatten(2)
    by_query = by_sample.transpose(1, 2).unflatten(2, sizes[2:])
    by_query = F.interpolate(by_query, size=wanted[2:], mode="bilinear").flatten(2)
    return by_query.reshape(1, heads, wanted[0] * wanted[1], wanted[2] * wanted[3]).to(table.dtype)


# -- the layer ------------------------------------------------------------------------------------------------------


class OffsetNet(nn.Module):
    """The offsets of every group's samples from its own channels of q; all groups share the weights.

    A depthwise convolution, LayerNorm, GELU, a linear layer to (row, column).

    Args:
        dim: channels C of q.
        groups: groups G; C divides by it.
        kernel_size: rows and columns of the convolution's kernel.
        stride: tokens per sample, on each axis.
        padding: zeros around the map.

    Shape: ``[B, H, W, C]`` to ``[B, Hk, Wk, G, 2]``.
    """

    def __init__(self, dim: int, groups: int, kernel_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.groups, self.kernel_size, self.stride, self.padding = groups, kernel_size, stride, padding
        width = dim // groups
        self.conv = nn.Conv2d(width, width, kernel_size, stride=stride, padding=padding, groups=width)
        self.norm = nn.LayerNorm(width)
        self.act = nn.GELU()
        self.proj = Linear(width, 2, bias=False)

    def forward(self, q: Tensor) -> Tensor:
        # the weights are repeated instead of folding the groups into the batch, which would copy q
        weight = self.conv.weight.repeat(self.groups, 1, 1, 1)
        bias = self.conv.bias.repeat(self.groups)  # type: ignore[union-attr]  # a convolution with bias
        q = pad_map(q, minimum=(self.kernel_size - 2 * self.padding,) * 2).permute(0, 3, 1, 2)
        q = F.conv2d(q, weight, bias, self.stride, self.padding, groups=self.groups * self.conv.out_channels)
        # groups before rows and columns: behind them, torch.export cannot tell that 2 W divides by W
        q = q.unflatten(1, (self.groups, self.conv.out_channels)).permute(0, 1, 3, 4, 2).contiguous()
        return self.proj(self.act(self.norm(q))).permute(0, 2, 3, 1, 4)


class PooledSamples(nn.Module):
    """Averages of cells of ``stride`` x ``stride`` tokens instead of samples at chosen points.

    Rows and columns that do not fill a cell are left out; a map smaller than a cell is padded to one.

    Shape: ``[B, H, W, C]`` to ``[B, H // stride, W // stride, C]``.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, minimum=(self.stride, self.stride))
        return F.avg_pool2d(x.permute(0, 3, 1, 2), self.stride).permute(0, 2, 3, 1)


class DeformableAttention(nn.Module):
    """Attention of all tokens to samples of the map that a small network places, section 3.2 of the first paper.

    ``softmax(q k^T / sqrt(D) + bias) v`` with k and v from ``sample2d(x, points)``; the points start on a regular grid and
    move by offsets computed from q, for every group of channels by itself.

    The published versions differ in where the grid lies and how offsets are limited; weights of one need its rule.
    n is the number of samples of an axis, f the ``offset_range``:

    =================  =================================  ==========================================
    n samples          version 1                          version 2
    =================  =================================  ==========================================
    grid               ``(i + 0.5) / n * 2 - 1``          ``(i + 0.5) / (n - 1) * 2 - 1``
    position, f >= 0   ``grid + tanh(offset) * f / n``    ``grid + tanh(offset) * f / (n - 1)``
    position, f < 0    ``tanh(grid + offset)``            ``grid + offset``, cut at -1 and 1
    queries in bias    ``(i + 0.5) / n * 2 - 1``          ``i / (n - 1) * 2 - 1``
    =================  =================================  ==========================================

    In version 1 f = 0 leaves the offset as it is. One sample on an axis lies in its middle.

    Args:
        dim: channels C.
        num_heads: heads N; C divides by it.
        map_size: rows and columns of the map that tables are made for; every other size works.
        groups: groups G of channels with points of their own; N divides by it.
        stride: tokens per sample, on each axis.
        kernel_size: rows and columns of the offset network's convolution.
        offset_range: how far a sample may move, in samples; negative: without limit.
        bias: "table" (relative positions, read bilinearly), "mlp" (computed from log-spaced displacements), "fixed" (one
            number for each query and sample), "conv" (a depthwise 3x3 convolution of q, added to the output), or "none".
        pooled: average cells of tokens instead of sampling at points, without offsets.
        version: 1 or 2.
        qkv_bias: learn a bias in the projections to q, k, v.
        proj_drop: dropout after the output projection.

    Shape: ``[B, H, W, C]``, unchanged, any H and W.

    Raises:
        ValueError: C does not divide into the heads or the heads into the groups, or an unknown ``bias`` or ``version``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int],
        *,
        groups: int = 1,
        stride: int = 1,
        kernel_size: int = 3,
        offset_range: float = -1.0,
        bias: str = "table",
        pooled: bool = False,
        version: int = 2,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if groups < 1 or num_heads % groups:
            raise ValueError(
                f"{num_heads} heads do not divide into {groups} groups. Choose a number of groups that divides it."
            )
        if bias not in BIASES:
            raise ValueError(f"bias is one of {', '.join(BIASES)}, got '{bias}'.")
        if version not in (1, 2):
            raise ValueError(f"version is 1 or 2, got {version}.")
        self.num_heads = num_heads
        self.head_dim = check_heads(dim, num_heads)
        self.groups, self.offset_range, self.version = groups, float(offset_range), version
        self.q, self.k, self.v = (Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        padding = 0 if kernel_size == stride and version == 2 else kernel_size // 2
        self.offset = None if pooled else OffsetNet(dim, groups, kernel_size, stride, padding)
        self.pool = PooledSamples(stride) if pooled else None
        self.make_bias(bias, map_size, stride)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def make_bias(self, kind: str, map_size: tuple[int, int], stride: int) -> None:
        """Create what the bias is computed from."""
        self.kind = kind
        height, width = map_size
        if kind == "table":
            self.rel_bias = nn.Parameter(torch.empty(self.num_heads, 2 * height - 1, 2 * width - 1))
            nn.init.trunc_normal_(self.rel_bias, std=0.01)
        elif kind == "fixed":
            self.sizes = (height, width, max(1, height // stride), max(1, width // stride))
            self.pair_bias = nn.Parameter(torch.empty(self.num_heads, height * width, self.sizes[2] * self.sizes[3]))
            nn.init.trunc_normal_(self.pair_bias, std=0.01)
        elif kind == "mlp":
            heads = self.num_heads // self.groups
            self.cpb_mlp = nn.Sequential(nn.Linear(2, 32), nn.ReLU(inplace=True), nn.Linear(32, heads, bias=False))
        elif kind == "conv":
            self.pe_conv = DepthwiseConv(self.num_heads * self.head_dim)

    def points(self, x: Tensor) -> Tensor:
        """Where keys and values are read from, for pictures and for ``sample2d``.

        Args:
            x: the map ``[B, H, W, C]`` that the layer is given (in a block: after its norm).

        Returns:
            ``[B, Hk, Wk, G, 2]``, (row, column) from -1 to 1, at least fp32. A pooled layer's are the grid itself.
        """
        return self.place(x, self.q(x))

    def place(self, x: Tensor, q: Tensor) -> Tensor:
        """``points`` for a map and its queries, both ``[B, H, W, C]``."""
        if self.offset is not None:
            return place_points(self.offset(q), self.offset_range, self.version)
        assert self.pool is not None
        still = torch.zeros_like(self.pool(x)[..., : 2 * self.groups]).unflatten(-1, (self.groups, 2))
        return place_points(still, self.offset_range, self.version)

    def bias(self, x: Tensor, points: Tensor) -> Tensor | PointBias | None:
        """What is added to the scores of the map's tokens ``x`` and the samples at ``points``: ``[B or 1, N, H * W, S]``."""
        if self.kind == "table":
            return point_bias(self.rel_bias, x, points, self.version)
        if self.kind == "fixed":
            return fixed_bias(self.pair_bias, x, points, self.sizes)
        if self.kind == "mlp":
            t = log_displacements(x, points, self.version)
            return self.cpb_mlp(t.to(x.dtype)).permute(0, 1, 4, 2, 3).flatten(1, 2)
        return None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        points = self.place(x, q)
        if self.pool is None:
            groups = x.unflatten(-1, (self.groups, self.num_heads // self.groups * self.head_dim))
            samples = sample2d(groups, points.flatten(1, 2)).flatten(2)
        else:
            samples = self.pool(x).flatten(1, 2)
        heads = (self.num_heads, self.head_dim)
        k, v = self.k(samples).unflatten(-1, heads), self.v(samples).unflatten(-1, heads)
        out = attend(q.flatten(1, 2).unflatten(-1, heads), k, v, bias=self.bias(x, points)).reshape(x.shape)
        if self.kind == "conv":
            out = out + self.pe_conv(q)
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, groups={self.groups}, bias={self.kind}, version={self.version}"


@register_mixer("deformable")
def deformable_attention(
    slot: Slot, *, groups: int | None = None, stride: int | None = None, kernel_size: int | None = None, bias: str = "table"
) -> nn.Module:
    """Softmax attention to samples of the map at learned points (DAT++); about 7 x 7 samples, two heads a group."""
    if groups is None:
        groups = slot.num_heads // 2 if slot.num_heads % 2 == 0 else 1
    if stride is None:
        stride = max(1, min(slot.map_size) // 7)
    return DeformableAttention(
        slot.dim,
        slot.num_heads,
        slot.map_size,
        groups=groups,
        stride=stride,
        kernel_size=max(9 - 2 * slot.stage, 3) if kernel_size is None else kernel_size,
        bias=bias,
        qkv_bias=slot.qkv_bias,
        proj_drop=slot.proj_drop,
    )
