"""Attention with content-dependent positions, as timm's HaloNet and BoTNet have it, through our op and at any image size.

A query meets a key with ``scale q . k + q . r[rows] + q . s[columns]``: two tables of vectors, one entry for each distance.
Both terms depend on the query and on one coordinate of the key alone, so they are part of the dot product: q carries its
products with the tables as further channels, k a 1 in the channel of its row and one in that of its column. No bias of
queries by keys is ever stored.

The layers here take over the parts of a timm layer, names and all, so that its checkpoints load into the model as before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from vitzoo.layers.exchange import takes_the_place_of
from vitzoo.ops import attend


def by_distance(q: Tensor, table: Tensor, dim: int, keys: int) -> Tensor:
    """Products of queries with the entry of each key's distance along one axis.

    Args:
        q: ``[B, h, w, N, D]``.
        table: ``[2 M - 1, D]``: the entry at M - 1 is that of distance 0, key minus query.
        dim: 1 for rows, 2 for columns.
        keys: how many coordinates the keys have along it, at most M.

    Returns:
        ``[B, h, w, N, keys]``.
    """
    queries = q.shape[dim]
    places = torch.arange(keys, device=q.device) - torch.arange(queries, device=q.device)[:, None]
    entries = table[places + (table.shape[0] - 1) // 2].to(q.dtype)  # [queries, keys, D]
    return torch.einsum("bhwnd,hkd->bhwnk" if dim == 1 else "bhwnd,wkd->bhwnk", q, entries)


def attend_by_distance(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, cols: Tensor, scale: float, scaled_terms: bool) -> Tensor:
    """Attention of every query of a map to every key of another one, with both position terms.

    Args:
        q: ``[B, h, w, N, D]``.
        k: ``[B, H, W, N, D]``.
        v: ``[B, H, W, N, E]``.
        rows: table of distances between rows, ``[2 M - 1, D]`` with M at least h and H.
        cols: the same of columns.
        scale: factor of the product of q and k.
        scaled_terms: the factor goes for the position terms as well.

    Returns:
        ``[B, h, w, N, E]``.
    """
    height, width = k.shape[1], k.shape[2]
    terms = torch.cat([by_distance(q, rows, 1, height), by_distance(q, cols, 2, width)], dim=-1)
    queries = torch.cat([q * scale, terms * scale if scaled_terms else terms], dim=-1).flatten(1, 2)
    row, col = (torch.eye(n, dtype=k.dtype, device=k.device) for n in (height, width))
    place = torch.cat([row[:, None].expand(-1, width, -1), col[None].expand(height, -1, -1)], dim=-1)
    keys = torch.cat([k, place[:, :, None].expand(*k.shape[:4], -1)], dim=-1).flatten(1, 2)
    values = v.flatten(1, 2)
    channels = max(keys.shape[-1], values.shape[-1])  # attend takes k and v of one width
    queries, keys, values = (F.pad(t, (0, channels - t.shape[-1])) for t in (queries, keys, values))
    out = attend(queries, keys, values, scale=1.0)[..., : v.shape[-1]]
    return out.unflatten(1, q.shape[1:3])


def pooled(x: Tensor, pool: nn.Module) -> Tensor:
    """A map ``[B, C, H, W]`` through timm's 2x2 average where the layer strides, rounded up at odd sizes."""
    return x if isinstance(pool, nn.Identity) else F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


@takes_the_place_of(HaloAttn)
class HaloAttention(nn.Module):
    """Every block of b x b tokens attends to itself and h tokens around it. Vaswani et al. 2021, arXiv:2103.12731.

    As in timm: zeros beyond the border are keys too, and where the layer strides, queries are every other token.

    Args:
        theirs: timm's layer, whose parts are used from now on.

    Shape: ``[B, C, H, W]`` to ``[B, C', ceil(H / s), ceil(W / s)]``, any H and W.
    """

    def __init__(self, theirs: HaloAttn) -> None:
        super().__init__()
        self.q, self.kv, self.pos_embed, self.pool = theirs.q, theirs.kv, theirs.pos_embed, theirs.pool
        self.num_heads, self.head_dim, self.scale = theirs.num_heads, theirs.dim_head_qk, theirs.scale
        self.block_size, self.query_block, self.halo_size = theirs.block_size, theirs.block_size_ds, theirs.halo_size
        self.scaled_terms = theirs.scale_pos_embed

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        b, h, own = self.block_size, self.halo_size, self.query_block
        blocks = -(-height // b), -(-width // b)
        q = self.q(x)
        rows, cols = q.shape[2:]
        q = F.pad(q, (0, blocks[1] * own - cols, 0, blocks[0] * own - rows))
        q = q.view(batch, self.num_heads, self.head_dim, blocks[0], own, blocks[1], own)
        q = q.permute(0, 3, 5, 4, 6, 1, 2).flatten(0, 2)  # [B * blocks, own, own, N, D]
        kv = F.pad(self.kv(x), (h, h + blocks[1] * b - width, h, h + blocks[0] * b - height))
        window = b + 2 * h
        kv = kv.unfold(2, window, b).unfold(3, window, b).unflatten(1, (self.num_heads, -1))
        kv = kv.permute(0, 3, 4, 5, 6, 1, 2).flatten(0, 2)  # [B * blocks, window, window, N, D + E]
        k, v = kv.split((self.head_dim, kv.shape[-1] - self.head_dim), dim=-1)
        out = attend_by_distance(q, k, v, self.pos_embed.height_rel, self.pos_embed.width_rel, self.scale, self.scaled_terms)
        out = out.unflatten(0, (batch, *blocks)).permute(0, 5, 6, 1, 3, 2, 4)
        out = out.reshape(batch, -1, blocks[0] * own, blocks[1] * own)[:, :, :rows, :cols]
        return pooled(out, self.pool)


@takes_the_place_of(BottleneckAttn)
class BottleneckAttention(nn.Module):
    """Every token attends to every other one. Srinivas et al. 2021, arXiv:2101.11605.

    Tables that were learned at another map size are resized linearly, each end staying an end.

    Args:
        theirs: timm's layer, whose parts are used from now on.

    Shape: ``[B, C, H, W]`` to ``[B, C', ceil(H / s), ceil(W / s)]``, any H and W.
    """

    def __init__(self, theirs: BottleneckAttn) -> None:
        super().__init__()
        self.qkv, self.pos_embed, self.pool = theirs.qkv, theirs.pos_embed, theirs.pool
        self.num_heads, self.head_dim, self.scale = theirs.num_heads, theirs.dim_head_qk, theirs.scale
        self.scaled_terms = theirs.scale_pos_embed

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).permute(0, 2, 3, 1)
        width = self.num_heads * self.head_dim
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in qkv.split((width, width, qkv.shape[-1] - 2 * width), dim=-1))
        tables = [
            resized(table, 2 * n - 1)
            for table, n in zip((self.pos_embed.height_rel, self.pos_embed.width_rel), x.shape[2:], strict=True)
        ]
        out = attend_by_distance(q, k, v, tables[0], tables[1], self.scale, self.scaled_terms)
        return pooled(out.flatten(-2).permute(0, 3, 1, 2), self.pool)


def resized(table: Tensor, size: int) -> Tensor:
    """``[n, D]`` to ``[size, D]``, linear, the ends staying ends; itself where it has that size."""
    if table.shape[0] == size:
        return table
    return F.interpolate(table.T[None], size=size, mode="linear", align_corners=True)[0].T
