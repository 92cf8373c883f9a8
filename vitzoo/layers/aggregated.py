"""TransNeXt's attention: in one softmax the eight neighbours of a token and pooled keys of the whole map.

Shi 2023, arXiv:2311.17132. Positions are a small MLP of log-scaled offsets, so that a model moves to other sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads, unit_length
from vitzoo.layers.linear import Linear
from vitzoo.layers.mixers import Slot
from vitzoo.layers.mixture import HeadRouter
from vitzoo.ops import attend, attend2d, merge_lse
from vitzoo.patterns import everywhere, halo

for _name in (
    "add_neighbors",
    "attend2d",
    "attend_aggregated",
    "log_keys",
    "log_offsets",
    "pool_map",
    "relative_table",
    "unit_length",
):
    torch.fx.wrap(_name)


class Cells(NamedTuple):
    """An axis of n coordinates in cells for pooling, P of them; in a captured graph one more, beyond the map.

    ``offset`` says where in a table over all offsets a query and a cell's centre find theirs. Centres lie on half coordinates,
    so offsets do; where cells are of one size they all lie on whole ones, or none does, and the table has half as many.
    """

    first: Tensor  # [P]
    end: Tensor  # [P]
    number: int  # without the spare one
    values: Tensor  # [T] offsets in the table, query minus centre, ascending
    offset: Tensor  # [n, P] place in the table


def cells(n: int, ratio: int, device: torch.device) -> Cells:
    """The cells of an axis pooled by ``ratio``, as PyTorch's adaptive pooling has them."""
    traced = torch.compiler.is_compiling()
    count = n // ratio if traced else max(n // ratio, 1)
    index = torch.arange(count + 1 if traced else count, device=device)
    first, end = index * n // count, ((index + 1) * n + count - 1) // count
    size, step = (n // count, 2) if not traced and n % count == 0 else (1, 1)
    reach = 2 * n - size - 1
    values = (torch.arange(2 * reach // step + 1, device=device) * step - reach) * 0.5
    offset = (2 * torch.arange(n, device=device)[:, None] - (first + end - 1) + reach) // step
    return Cells(first, end, count, values, offset.clamp(0, 2 * reach // step))


def pool_map(x: Tensor, ratio: int) -> Tensor:
    """Means of cells: ``[B, H, W, C]`` to ``[B, P, Q, C]``, zero in spare ones. Two products: sums in a fixed order.

    Channels go to the batch: what would split rows from columns again asks, in a captured graph, whether sizes divide.
    """
    maps = x.permute(0, 3, 1, 2).flatten(0, 1)
    rows, cols = (shares(n, ratio, x).expand(maps.shape[0], -1, -1) for n in x.shape[1:3])
    pooled = torch.bmm(torch.bmm(rows, maps), cols.mT)
    return pooled.unflatten(0, (-1, x.shape[3])).permute(0, 2, 3, 1)


def shares(n: int, ratio: int, like: Tensor) -> Tensor:
    """What each of n coordinates is of the mean of each cell: ``[P, n]`` in the dtype of ``like``."""
    axis, place = cells(n, ratio, like.device), torch.arange(n, device=like.device)
    inside = (place >= axis.first[:, None]) & (place < axis.end[:, None])
    return (inside / (axis.end - axis.first)[:, None]).to(like.dtype)


def log_scaled(rows: Tensor, cols: Tensor, reference: tuple[int, int]) -> Tensor:
    """Offsets in tokens as the MLP reads them, ``[T, U, 2]``: over the map of pre-training, times 8, logarithms of base 8."""
    rows, cols = (offsets * (8 / max(n - 1, 1)) for offsets, n in zip((rows, cols), reference, strict=True))
    grid = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1)
    return grid.sign() * torch.log2(grid.abs() + 1) / 3


def log_offsets(x: Tensor, ratio: int, reference: tuple[int, int], like: Tensor) -> Tensor:
    """All offsets of the map ``x`` ``[B, H, W, C]`` from its cells, ``[T, U, 2]``, in the dtype of ``like``."""
    rows, cols = (cells(n, ratio, x.device).values for n in (x.shape[1], x.shape[2]))
    return log_scaled(rows, cols, reference).to(like.dtype)


def relative_table(x: Tensor, reference: tuple[int, int], like: Tensor) -> Tensor:
    """All offsets between two tokens of ``x``, ``[2 H - 1, 2 W - 1, 2]``, descending: tables of ops are key minus query."""
    rows, cols = (n - 1 - torch.arange(2 * n - 1, device=x.device) for n in (x.shape[1], x.shape[2]))
    return log_scaled(rows, cols, reference).to(like.dtype)


def log_keys(x: Tensor, ratio: int) -> Tensor:
    """The logarithm of how many keys each token of ``x`` ``[B, H, W, C]`` sees: ``[H, W, 1, 1]``.

    With ``ratio`` 1 all tokens; else its neighbours on the map, itself included, and the cells.
    """
    height, width = x.shape[1], x.shape[2]
    rows, cols = (torch.arange(n, device=x.device) for n in (height, width))
    if ratio == 1:
        return torch.full_like(rows, height * width, dtype=torch.float32).log().to(x.dtype)[:, None, None, None]
    near_rows, near_cols = (3 - (c == 0).int() - (c == n - 1).int() for c, n in ((rows, height), (cols, width)))
    pooled = cells(height, ratio, x.device).number * cells(width, ratio, x.device).number
    return (near_rows[:, None] * near_cols + pooled).float().log().to(x.dtype)[:, :, None, None]


def add_neighbors(v: Tensor, weights: Tensor) -> Tensor:
    """``sum_j weights[..., j] v[neighbour j]`` over a 3x3 neighbourhood, zero beyond the map.

    Args:
        v: ``[B, H, W, N, D]``.
        weights: ``[B, H, W, N, 9]``, row by row.

    Returns:
        ``[B, H, W, N, D]``.
    """
    height, width = v.shape[1], v.shape[2]
    padded = F.pad(v, (0, 0, 0, 0, 1, 1, 1, 1))
    near = (padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    return sum(weights[..., j : j + 1] * each for j, each in enumerate(near))  # type: ignore[return-value]  # not empty


def attend_aggregated(q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, near_bias: Tensor, table: Tensor, ratio: int) -> Tensor:
    """One softmax over the neighbours of a token and the cells of the map, equation 5.

    Args:
        q: scaled queries ``[B, H, W, N, D]``.
        k: keys, likewise.
        v: values, likewise.
        pooled: keys and values of the cells, ``[B, P, Q, 2, N, D]``.
        near_bias: ``[N, 9]``, row by row.
        table: bias of every offset from a cell, ``[T, U, N]``.
        ratio: by what the map is pooled.

    Returns:
        ``[B, H, W, N, D]``.
    """
    rows, cols = (cells(n, ratio, q.device) for n in (q.shape[1], q.shape[2]))
    bias = table[rows.offset[:, None, :, None], cols.offset[None, :, None, :]].permute(4, 0, 1, 2, 3)
    if torch.compiler.is_compiling():
        real = [torch.arange(axis.number + 1, device=q.device) < axis.number for axis in (rows, cols)]
        bias = torch.where(real[0][:, None] & real[1], bias, -torch.inf)
    near, near_lse = attend2d(q, k, v, halo(1, 1), bias=near_bias.unflatten(-1, (3, 3)), scale=1.0, return_lse=True)
    keys, values = pooled.flatten(1, 2).unbind(2)
    bias = bias.flatten(3, 4).flatten(1, 2)
    far, far_lse = attend(q.flatten(1, 2), keys, values, bias=bias, scale=1.0, return_lse=True)
    return merge_lse([near, far.view_as(near)], [near_lse, far_lse.view_as(near_lse)])


class LengthScaledAttention(nn.Module):
    """Cosine attention among all tokens, heads weighed by a router: section 3.3, with a bias from offsets.

        softmax((q / |q| + e) tau log(keys) . k / |k| + mlp(offset)) v

    Args:
        slot: the place.
        reference: rows and columns of the map in pre-training.
        shared: heads that every token takes.
        topk: heads that a token takes of the others.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, slot: Slot, reference: tuple[int, int], shared: int, topk: int) -> None:
        super().__init__()
        self.split = (slot.num_heads, check_heads(slot.dim, slot.num_heads))
        self.reference, self.ratio = reference, 1
        self.make_projections(slot)
        self.query_embedding = nn.Parameter(torch.empty(slot.num_heads, 1, self.split[1]))
        self.temperature = nn.Parameter(torch.empty(slot.num_heads, 1, 1))
        self.cpb = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, slot.num_heads))
        self.router = HeadRouter(slot.dim, slot.num_heads, shared, topk)
        self.proj = Linear(slot.dim, slot.dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def make_projections(self, slot: Slot) -> None:
        """Create what q, k and v come from."""
        self.qkv = Linear(slot.dim, 3 * slot.dim, bias=slot.qkv_bias)

    def init_weights(self) -> None:
        """Scores start over 0.24, with small query embeddings."""
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        nn.init.constant_(self.temperature, 4.15097)  # softplus of it is 1 / 0.24

    def scaled(self, q: Tensor, x: Tensor) -> Tensor:
        """What meets the keys, from unit queries ``[B, H, W, N, D]`` of the map ``x``."""
        scale = F.softplus(self.temperature).squeeze(-1).to(q.dtype)
        return (q + self.query_embedding.squeeze(1)) * scale * log_keys(x, self.ratio)

    def attend(self, x: Tensor) -> Tensor:
        """``[B, H, W, C]`` to ``[B, H, W, N, D]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, *self.split)).unbind(-3)
        bias = self.cpb(relative_table(x, self.reference, self.temperature)).permute(2, 0, 1)
        return attend2d(self.scaled(unit_length(q), x), unit_length(k), v, everywhere, bias=bias, scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(x) * self.router(x).unsqueeze(-1)
        return self.proj_drop(self.proj(out.flatten(-2)))


class AggregatedAttention(LengthScaledAttention):
    """The same where a map is large: a token sees its eight neighbours and the pooled map, section 3.2.

    To the values of neighbours goes also ``q . t_j + b_j``, with a learned key for each place, outside the softmax.

    Args:
        slot: the place; ``slot.kv_ratio`` is by what the map is pooled.
        reference: rows and columns of the map in pre-training.
        shared: heads that every token takes.
        topk: heads that a token takes of the others.

    Shape: ``[B, H, W, C]``, unchanged, H and W at least ``slot.kv_ratio``.
    """

    def make_projections(self, slot: Slot) -> None:
        heads, dim = self.split
        self.ratio = slot.kv_ratio
        self.q = Linear(slot.dim, slot.dim, bias=slot.qkv_bias)
        self.kv = Linear(slot.dim, 2 * slot.dim, bias=slot.qkv_bias)
        self.sr = Linear(slot.dim, slot.dim)
        self.norm = nn.LayerNorm(slot.dim)
        self.near_bias = nn.Parameter(torch.empty(heads, 9))
        self.near_keys = nn.Parameter(torch.empty(heads, dim, 9))
        self.near_weight = nn.Parameter(torch.empty(heads, 1, 9))

    def init_weights(self) -> None:
        """As published; a bias of 0.0004 is nearly none."""
        super().init_weights()
        nn.init.constant_(self.near_bias, 0.0004)
        nn.init.trunc_normal_(self.near_keys, std=0.02)
        nn.init.zeros_(self.near_weight)

    def attend(self, x: Tensor) -> Tensor:
        q = unit_length(self.q(x).unflatten(-1, self.split))
        k, v = self.kv(x).unflatten(-1, (2, *self.split)).unbind(-3)
        cell_k, cell_v = self.kv(self.norm(pool_map(F.gelu(self.sr(x)), self.ratio))).unflatten(-1, (2, *self.split)).unbind(-3)
        pooled = torch.stack([unit_length(cell_k), cell_v], dim=-3)
        table = self.cpb(log_offsets(x, self.ratio, self.reference, self.temperature))
        out = attend_aggregated(self.scaled(q, x), unit_length(k), v, pooled, self.near_bias, table, self.ratio)
        weights = torch.einsum("bhwnd,ndk->bhwnk", q, self.near_keys) + self.near_weight.squeeze(1)
        return out + add_neighbors(v, weights)
