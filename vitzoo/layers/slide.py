"""Attention of every token to learned shifts of the map: slide attention, arXiv:2304.04237."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads
from vitzoo.layers.linear import Linear
from vitzoo.layers.mixers import Slot, register_mixer

torch.fx.wrap("slide_weight")


def slide_weight(learned: Tensor, copies: int) -> Tensor:
    """Kernels of the nine shifts by one token plus the learned ones ``[9 c, 1, 3, 3]``, ``copies`` times over."""
    shifts = torch.eye(9, device=learned.device, dtype=learned.dtype).view(9, 1, 3, 3)
    return (learned + shifts.repeat(learned.shape[0] // 9, 1, 1, 1)).repeat(copies, 1, 1, 1)


@register_mixer("slide")
class SlideAttention(nn.Module):
    """Attention to nine shifts of the map, each a learned 3x3 convolution that begins as a shift.

    Pan et al. 2023, arXiv:2304.04237, in a quarter of the width, as DAT++ has it. Zeros beyond the border are keys too.

    Args:
        slot: the place; its heads divide its channels and a quarter of them.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    NO_DECAY = ("k_table",)

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        self.num_heads, self.width = slot.num_heads, check_heads(slot.dim // 4, slot.num_heads)
        self.scale = check_heads(slot.dim, slot.num_heads) ** -0.5  # of the full width, as published
        self.qkv = Linear(slot.dim, 3 * self.num_heads * self.width, bias=slot.qkv_bias)
        self.shift = nn.Conv2d(self.width, 9 * self.width, 3, padding=1, groups=self.width)
        self.k_table = nn.Parameter(torch.empty(self.num_heads, 9))
        self.proj = Linear(self.num_heads * self.width, slot.dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal 0.01 for the table of the shifts."""
        nn.init.trunc_normal_(self.k_table, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        q, kv = self.qkv(x).unflatten(-1, (self.num_heads, 3, self.width)).split((1, 2), dim=-2)
        kv = kv.flatten(-3).permute(0, 3, 1, 2)  # one convolution for k and v of all heads
        copies = 2 * self.num_heads
        weight = slide_weight(self.shift.weight, copies)
        bias = self.shift.bias.repeat(copies)  # type: ignore[union-attr]  # a convolution with bias
        shifted = F.conv2d(kv, weight, bias, padding=1, groups=copies * self.width).permute(0, 2, 3, 1)
        k, v = shifted.unflatten(-1, (self.num_heads, 2, self.width, 9)).unbind(-3)
        scores = (q.transpose(-1, -2) * (k + self.k_table[:, None])).sum(-2) * self.scale
        out = (scores.softmax(-1)[..., None, :] * v).sum(-1)
        return self.proj_drop(self.proj(out.flatten(-2)))
