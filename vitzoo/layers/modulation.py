"""Tokens multiplied by what depthwise convolutions of several sizes say of their surroundings: SMT, arXiv:2307.08579."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads
from vitzoo.layers.conv import ConvNorm, DepthwiseConv
from vitzoo.layers.linear import Linear
from vitzoo.layers.mixers import Slot, register_mixer


@register_mixer("scale_modulation")
class ScaleModulation(nn.Module):
    """``proj(v * modulate(mix(scales(s))))``: a token times what its surroundings of several sizes say; section 3.1.

    The i-th of n shares of s goes through a depthwise convolution of 3 + 2i. ``mix`` sees the n shares' same channel at a
    time, a grouped layer with batch norm and a GELU behind it; ``modulate`` sees all channels.

    Args:
        slot: the place; its channels divide by ``scales``.
        scales: shares n.
        expand: channels behind ``mix`` over the width.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, slot: Slot, *, scales: int = 4, expand: int = 2) -> None:
        super().__init__()
        dim, share = slot.dim, check_heads(slot.dim, scales)
        self.v = Linear(dim, dim, bias=slot.qkv_bias)
        self.s = Linear(dim, dim, bias=slot.qkv_bias)
        self.scales = nn.ModuleList(DepthwiseConv(share, 3 + 2 * i) for i in range(scales))
        self.mix = ConvNorm(dim, expand * dim, 1, groups=share, bias=True)
        self.act = nn.GELU()
        self.modulate = Linear(expand * dim, dim)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.s(x).unflatten(-1, (len(self.scales), -1))
        seen = torch.stack([conv(shares.select(-2, i)) for i, conv in enumerate(self.scales)], dim=-1)
        modulator = self.modulate(self.act(self.mix(seen.flatten(-2))))
        return self.proj_drop(self.proj(modulator * self.v(x)))
