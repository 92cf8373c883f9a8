"""A relative position table read between its entries: the bias of keys that lie anywhere on the map of the queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitzoo.ops._bilinear import bilinear, nearness, slope


class PointBias(NamedTuple):
    """The bias of keys sampled at points, for `attend`; Xia et al. 2022, arXiv:2201.00520, equation 6.

        bias[b, n, (i, j), s] = table[n] at row (points[b, s, g, 0] - rows[i] + 2) / 4 * (R - 1),
                                     column (points[b, s, g, 1] - cols[j] + 2) / 4 * (C - 1)

    between four entries bilinearly, zeros beyond the table; g is the group of head n. A table for a map of Hq x Wq has
    R = 2 Hq - 1 and C = 2 Wq - 1 rows and columns, an entry for every difference of two of its tokens.

    Attributes:
        table: `[N, R, C]`, sample minus query, of any floating dtype.
        points: `[B, S, G, 2]`, row and column of every key in units in which -1 and 1 are the ends of the map, at least fp32. N
            divides by G; the heads of a group share its points.
        rows: `[H]`, the rows of the queries in the same units; constants. The queries are H x W tokens, row by row.
        cols: `[W]`, their columns.

    Differentiable in table and points; where a pair lies exactly on an entry, the gradient is that towards the smaller offset.
    """

    table: Tensor
    points: Tensor
    rows: Tensor
    cols: Tensor

    def check(self, B: int, N: int, L: int, S: int, device: torch.device) -> None:
        """Raise ValueError unless it is a bias for `[B, N, L, S]` scores on a device."""
        if self.table.ndim != 3 or self.table.shape[0] != N or self.points.ndim != 4 or self.points.shape[3] != 2:
            raise ValueError(
                f"attend needs a PointBias of a table [{N}, R, C] and points [{B}, {S}, G, 2], "
                f"got {list(self.table.shape)}, {list(self.points.shape)}."
            )
        if tuple(self.points.shape[:2]) != (B, S) or N % self.points.shape[2]:
            raise ValueError(
                f"attend needs points [{B}, {S}, G, 2] with a G that divides {N} heads, got {list(self.points.shape)}."
            )
        if self.rows.ndim != 1 or self.cols.ndim != 1 or self.rows.shape[0] * self.cols.shape[0] != L:
            raise ValueError(
                f"attend needs rows [H] and cols [W] of {L} = H * W queries, "
                f"got {list(self.rows.shape)}, {list(self.cols.shape)}."
            )
        if any(not t.is_floating_point() or t.device != device for t in self):
            raise ValueError(f"attend needs floating table, points, rows and cols on {device}.")

    def dense(self) -> Tensor:
        """The bias of all pairs, `[B, N, H * W, S]` in the dtype of points, by PyTorch's `grid_sample`."""
        table, points = self.table, self.points
        B, G, H, W = points.shape[0], points.shape[2], self.rows.shape[0], self.cols.shape[0]
        y, x = points.permute(3, 0, 2, 1).contiguous()  # [B, G, S]
        y, x = (self.rows[:, None] - y[:, :, None]) / 2, (self.cols[:, None] - x[:, :, None]) / 2
        y, x = y[:, :, :, None].expand(-1, -1, -1, W, -1), x[:, :, None].expand(-1, -1, H, -1, -1)
        grid = torch.stack((x, y), dim=-1).flatten(2, 3)
        # turned rather than the grid negated: a point exactly on an entry gets its gradient from the published side
        tables = table.to(points.dtype).flip(1, 2).unflatten(0, (G, table.shape[0] // G)).expand(B, -1, -1, -1, -1)
        return bilinear(tables.flatten(0, 1), grid.flatten(0, 1)).unflatten(0, (B, G)).flatten(1, 2)

    def weights(self, *, slopes: bool = False) -> tuple[Tensor, Tensor]:
        """How near pairs are to the rows `[B, N, H, S, R]` and the columns `[B, N, W, S, C]` of the table turned around.

        With `slopes`, the derivatives of these weights by the points.
        """
        each = self.table.shape[0] // self.points.shape[2]
        found = []
        for axis, queries in enumerate((self.rows, self.cols)):
            n = self.table.shape[1 + axis]
            offset = (queries[:, None] - self.points[..., axis].transpose(1, 2)[:, :, None]) / 2
            weight = -slope(offset, n) / 2 if slopes else nearness(offset, n)
            found.append(weight.repeat_interleave(each, 1))
        return found[0], found[1]

    def defined(self) -> Tensor:
        """`dense` as the definition says it: every entry weighs in by how near it is."""
        rows, cols = self.weights()
        return torch.einsum("nrc,bnhsr,bnwsc->bnhws", self.table.to(rows.dtype).flip(1, 2), rows, cols).flatten(2, 3)

    def gradients(self, dbias: Tensor) -> tuple[Tensor, Tensor]:
        """Those of table and points from that of the bias of all pairs, `[B, N, H * W, S]`."""
        table = self.table.to(dbias.dtype).flip(1, 2)
        dbias = dbias.unflatten(2, (self.rows.shape[0], self.cols.shape[0]))
        (rows, cols), (row_slopes, col_slopes) = self.weights(), self.weights(slopes=True)
        dtable = torch.einsum("bnhws,bnhsr,bnwsc->nrc", dbias, rows, cols).flip(1, 2)
        both = ((row_slopes, cols), (rows, col_slopes))
        by_head = torch.stack([torch.einsum("bnhws,nrc,bnhsr,bnwsc->bsn", dbias, table, *pair) for pair in both], -1)
        dpoints = by_head.unflatten(2, (self.points.shape[2], -1)).sum(3)
        return dtable.to(self.table.dtype), dpoints.to(self.points.dtype)
