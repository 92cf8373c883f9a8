"""Attention in groups of neighbours or of tokens that lie apart, with a position bias that is computed from the offset.

Wang et al. 2022, arXiv:2108.00154 (CrossFormer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.layers.attention import PatternAttention
from vitzoo.layers.mixers import Slot, register_mixer
from vitzoo.ops import attend, attend2d
from vitzoo.patterns import Pattern, dilated_window, everywhere, window

for _name in ("attend_in_groups", "offsets"):
    torch.fx.wrap(_name)


class PositionMlp(nn.Module):
    """The bias of every offset, section 3.2.2: ``[..., 2]`` to ``[..., heads]``. Offsets are in tokens, as they are."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        width = dim // 16
        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = (
            nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out)) for out in (width, width, heads)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(x))))


def one_group(height: int, width: int, group: int) -> int:
    """1 where a map has a side no longer than a group and so is one group itself, else 0; sizes may be symbols."""
    return 1 // (1 + (height - 1) // group * ((width - 1) // group))


def reaches(x: Tensor, group: int) -> tuple[int, int]:
    """How far apart two tokens of a group of the map ``x`` ``[B, H, W, ...]`` can be.

    A captured graph has to hold for both kinds of groups: there the sum of what either needs.
    """
    height, width = x.shape[1], x.shape[2]
    if torch.compiler.is_compiling():
        return height + group - 2, width + group - 2
    return (height - 1, width - 1) if one_group(height, width, group) else (group - 1, group - 1)


def offsets(x: Tensor, group: int, like: Tensor) -> Tensor:
    """Offsets of queries from keys, ``[2 * reach_y + 1, 2 * reach_x + 1, 2]``, in the dtype of ``like``.

    Descending, since tables of ``attend2d`` are read at key minus query and the published ones at query minus key.
    """
    axes = [reach - torch.arange(2 * reach + 1, device=x.device) for reach in reaches(x, group)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(like.dtype)


def attend_in_groups(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, group: int, table: Tensor) -> Tensor:
    """Attention along ``pattern``, or among all tokens where the map is one group.

    Args:
        q: queries ``[B, H, W, N, D]``.
        k: keys.
        v: values.
        pattern: a window or a dilated window.
        group: its size.
        table: the bias ``[N, 2 * reach_y + 1, 2 * reach_x + 1]``, with the reach of ``reaches``.

    Returns:
        ``[B, H, W, N, D]``.
    """
    height, width = q.shape[1], q.shape[2]
    if not torch.compiler.is_compiling():
        return attend2d(q, k, v, everywhere if one_group(height, width, group) else pattern, bias=table)
    index = torch.arange(2 * group - 1, device=q.device)
    near = attend2d(q, k, v, pattern, bias=table[:, (index + (height - 1))[:, None], (index + (width - 1))[None]])
    only = one_group(height, width, group)
    return near * (1 - only) + attend_everywhere(q, k, v, group, table) * only


def attend_everywhere(q: Tensor, k: Tensor, v: Tensor, group: int, table: Tensor) -> Tensor:
    """For a captured graph: attention among all tokens where the map is one group, else among four of them, to no purpose."""
    height, width = q.shape[1], q.shape[2]
    # divided, not multiplied by 0 or 1: so PyTorch can tell that it is never 0 or 1, which it would specialise
    count = (height * width - 4) // (1 + (height - 1) // group * ((width - 1) // group) * 2**24) + 4
    token = torch.arange(count, device=q.device)
    y = (token[:, None] >= torch.arange(1, height + 1, device=q.device) * width).sum(1)
    u = token - y * width
    dy, du = (c[None, :] - c[:, None] + (n + group - 2) for c, n in ((y, height), (u, width)))
    some = (t[:, y, u] for t in (q, k, v))
    out = attend(*some, bias=table[:, dy, du])
    rows, cols = torch.arange(height, device=q.device), torch.arange(width, device=q.device)
    return out[:, (rows[:, None] * width + cols).clamp(max=count - 1)]


class GroupAttention(PatternAttention):
    """Attention in groups of ``group`` x ``group`` tokens that lie ``interval`` apart, with a computed position bias."""

    def __init__(self, dim: int, num_heads: int, group: int, interval: int = 1, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, window(group) if interval == 1 else dilated_window(group, interval), **kwargs)
        self.group = group
        self.pos = PositionMlp(dim, num_heads)

    def make_bias(self, table_size: tuple[int, int]) -> None:
        """Nothing: the bias is computed for the reach at hand."""

    def bias(self, x: Tensor) -> Tensor:
        return self.pos(offsets(x, self.group, self.pos.pos_proj.weight)).permute(2, 0, 1)

    def attend(self, x: Tensor) -> Tensor:
        return attend_in_groups(*self.project(x), self.pattern, self.group, self.bias(x))


@register_mixer("long_short")
def long_short_attention(slot: Slot, *, size: int = 7, interval: int = 4) -> nn.Module:
    """Softmax attention in windows of ``size`` x ``size`` and, in odd blocks, among as many tokens ``interval`` apart."""
    step = interval if slot.block % 2 else 1
    return GroupAttention(slot.dim, slot.num_heads, size, step, qkv_bias=slot.qkv_bias, proj_drop=slot.proj_drop)
