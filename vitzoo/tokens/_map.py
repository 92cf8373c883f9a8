"""What a reduction made of tokens: which stay, which move into which, which are gone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitzoo.ops import merge_tokens, unmerge_tokens
from vitzoo.ops.merge_tokens.rows import add_rows, rows


class TokenMap(NamedTuple):
    """A step from N tokens to M, for every image of a batch.

    Attributes:
        kept: ``[B, M - made]``: the old token at each new place.
        moved: ``[B, R]``: old tokens that go into another one.
        into: ``[B, R]``: the new place of each.
        length: N.
        made: places at the end, without an old token, that exist only for what moves into them.

    What is neither kept nor moved is dropped.
    """

    kept: Tensor
    moved: Tensor
    into: Tensor
    length: int
    made: int = 0

    @property
    def source(self) -> Tensor:
        """``[B, N]``: the new place that stands for each old token; -1 where it was dropped."""
        batch, count = self.kept.shape
        source = torch.full((batch, self.length), -1, dtype=torch.long, device=self.kept.device)
        source = source.scatter(1, self.kept, torch.arange(count, device=self.kept.device).expand(batch, count))
        return source.scatter(1, self.moved, self.into)

    def merge(self, x: Tensor, mode: str = "sum") -> Tensor:
        """Bring what moves together with what stays.

        Args:
            x: ``[B, N, ...]``.
            mode: "sum", "mean" (every old token counts once) or "amax".

        Returns:
            ``[B, M, ...]``.

        Raises:
            ValueError: another mode.
        """
        y = rows(x, self.kept)
        if self.made:
            y = torch.cat([y, y.new_zeros(y.shape[0], self.made, *y.shape[2:])], dim=1)
        if mode == "amax":
            where = self.into.view(*self.into.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
            return y.scatter_reduce(1, where, rows(x, self.moved), "amax", include_self=True)
        if mode not in ("sum", "mean"):
            raise ValueError(f"merge takes 'sum', 'mean' or 'amax', got '{mode}'.")
        y = add_rows(y, self.into, rows(x, self.moved))
        if mode == "sum":
            return y
        count = self.sizes(x.new_ones(x.shape[:2]))
        return y / count.view(*count.shape, *(1,) * (x.ndim - 2))

    def sizes(self, size: Tensor) -> Tensor:
        """Old patches in each new token: ``[B, N]`` to ``[B, M]``."""
        return self.merge(size)

    def average(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means weighted by size.

        Args:
            x: ``[B, N, C]``.
            size: ``[B, N]``; None: all are 1.

        Returns:
            ``[B, M, C]`` and the new sizes ``[B, M]``, fp32 where there were none. A token that nothing moved into keeps its
            bits.
        """
        if size is None:
            moving = torch.ones_like(self.into, dtype=torch.float32)
            old = moving.new_ones(self.kept.shape)
        else:
            old, moving = size.gather(1, self.kept), size.gather(1, self.moved)
        new = old.scatter_add(1, self.into, moving)
        return merge_tokens(x, self.kept, self.moved, self.into, moving / new.gather(1, self.into)), new

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every old token the value of what stands for it: ``[B, M, ...]`` to ``[B, N, ...]``; zeros for dropped ones."""
        return unmerge_tokens(y.flatten(2) if y.ndim > 2 else y[..., None], self.source).view(y.shape[0], -1, *y.shape[2:])


def keep_only(kept: Tensor, length: int, made: int = 0) -> TokenMap:
    """A map that drops everything but ``kept`` ``[B, M]``."""
    nothing = kept[:, :0]
    return TokenMap(kept, nothing, nothing, length, made)


def complement(index: Tensor, length: int) -> Tensor:
    """What ``index`` ``[B, M]`` leaves out of 0 .. length - 1, ascending: ``[B, length - M]``."""
    batch, count = index.shape
    free = torch.ones(batch, length, dtype=torch.long, device=index.device).scatter(1, index, 0)
    return free.argsort(dim=1, descending=True, stable=True)[:, : length - count]


def protect(index: Tensor, prefix: int) -> Tensor:
    """Indices of patches ``[B, M]``, counted without the prefix tokens, as indices of tokens with all of those in front."""
    first = torch.arange(prefix, device=index.device).expand(index.shape[0], prefix)
    return torch.cat([first, index + prefix], dim=1)
