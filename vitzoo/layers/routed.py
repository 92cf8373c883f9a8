"""Bi-level routing attention: regions of the map choose each other, and their tokens attend to each other.

Zhu et al. 2023, arXiv:2303.08810 (BiFormer).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads
from vitzoo.layers.conv import DepthwiseConv
from vitzoo.layers.linear import Linear
from vitzoo.layers.maps import crop_map, pad_map, padded_size
from vitzoo.layers.mixers import Slot, register_mixer
from vitzoo.ops import attend_routed

for _name in ("attend_in_regions", "crop_map", "pad_map"):
    torch.fx.wrap(_name)


def region_axis(n: int, n_win: int, late: bool) -> tuple[int, int]:
    """How many regions an axis of ``n`` tokens has, and of how many tokens each; the last ones may lie beyond the map.

    ``n_win`` regions. With ``late`` their size is rounded down, so that there may be more: up to twice as many less one, which
    is what a captured graph takes for all sizes; regions without any token are never chosen.
    """
    if not late:
        return n_win, (n + n_win - 1) // n_win
    size = n // n_win + 1 // (1 + n // n_win)  # 1 at least; an exported maximum would leave guards behind
    return (2 * n_win - 1 if torch.compiler.is_compiling() else max((n + size - 1) // size, n_win)), size


def region_means(x: Tensor, axes: tuple[tuple[int, int], ...], tokens: tuple[Tensor, ...]) -> Tensor:
    """Mean token of every region, ``[B, R, C]`` in fp32, from a padded map ``[B, H, W, N, D]`` whose padding is zero."""
    (rows, height), (cols, width) = axes
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = wide.reshape(x.shape[0], rows, height, cols, width, x.shape[3] * x.shape[4]).sum((2, 4))
    return (total / (tokens[0][:, None, None] * tokens[1][:, None]).clamp(min=1)).flatten(1, 2)


@torch.no_grad()
def route(q: Tensor, k: Tensor, axes: tuple[tuple[int, int], ...], size: tuple[int, int], topk: int) -> Tensor:
    """The ``topk`` regions that every region is most alike, section 3.2: ``[B, R, topk]``, the likest first.

    No gradient flows through the choice, as published. Regions that are equally alike come in their order.
    """
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        spans = [
            (n - torch.arange(count, device=q.device) * length).clamp(0, length)
            for (count, length), n in zip(axes, size, strict=True)
        ]
        likeness = region_means(q, axes, (spans[0], spans[1])) @ region_means(k, axes, (spans[0], spans[1])).transpose(1, 2)
        exists = (spans[0][:, None] * spans[1]).flatten() > 0
        likeness = torch.where(exists, likeness, -torch.inf)
        if torch.compiler.is_exporting():  # ONNX sorts, but does not promise the order of equals
            return likeness.sort(dim=-1, descending=True).indices[..., :topk]
        return likeness.sort(dim=-1, descending=True, stable=True).indices[..., :topk]


def attend_in_regions(qkv: Tensor, n_win: int, topk: int, late: bool) -> Tensor:
    """Bi-level routing attention, section 3.2, of packed q, k, v ``[B, H, W, 3, N, D]``: ``[B, H, W, N, D]``.

    Scores are scaled by one over the root of all heads' channels, as published.
    """
    height, width, heads, dim = qkv.shape[1], qkv.shape[2], qkv.shape[4], qkv.shape[5]
    axes = region_axis(height, n_win, late), region_axis(width, n_win, late)
    bottom, right = (count * size - n for (count, size), n in zip(axes, (height, width), strict=True))
    padded = qkv
    if torch.compiler.is_compiling() or bottom or right:
        padded = F.pad(qkv, (*(0, 0) * 3, 0, right, 0, bottom))
    q, k, v = padded.unbind(3)
    # a map that was shorter than n_win is full of regions of one token, zeros that may be chosen
    size = tuple(padded_size(n, minimum=n_win) for n in (height, width)) if late else (height, width)
    index = route(q, k, axes, (size[0], size[1]), topk)
    out = attend_routed(q, k, v, (axes[0][0], axes[1][0]), index, scale=(heads * dim) ** -0.5)
    return crop_map(out, qkv)


@register_mixer("routed")
class RoutedAttention(nn.Module):
    """Attention among the tokens of the regions most alike, and a depthwise 5x5 convolution of v.

    Args:
        slot: the place.
        n_win: regions on a side of the map.
        topk: how many of them a region sees.
        late: pad behind the projection, not before, and round the size of regions down (the op's second version).

    Raises:
        ValueError: more regions to see than there are.

    Shape: ``[B, H, W, C]``, unchanged, any H and W.
    """

    def __init__(self, slot: Slot, *, n_win: int = 7, topk: int = 4, late: bool = False) -> None:
        super().__init__()
        if not 1 <= topk <= n_win**2:
            raise ValueError(f"Of {n_win} x {n_win} regions a region sees 1 to {n_win**2}, not {topk}. Choose a smaller topk.")
        self.n_win, self.topk, self.late = n_win, topk, late
        self.multiple = (1, 1) if late else (n_win, n_win)
        self.split = (3, slot.num_heads, check_heads(slot.dim, slot.num_heads))
        self.qkv = Linear(slot.dim, 3 * slot.dim, bias=slot.qkv_bias)
        self.lepe = DepthwiseConv(slot.dim, 5)
        self.proj = Linear(slot.dim, slot.dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(pad_map(x, self.multiple)).unflatten(-1, self.split)
        out = attend_in_regions(qkv, self.n_win, self.topk, self.late).flatten(-2)
        return self.proj_drop(self.proj(crop_map(out + self.lepe(qkv.select(3, 2).flatten(-2)), x)))
