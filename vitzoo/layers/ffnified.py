"""Attention's place taken by two depthwise convolutions of a large kernel: FFNet, arXiv:2406.02021, section 3.2."""

from __future__ import annotations

from torch import Tensor, nn

from vitzoo.layers.conv import ConvNorm, DepthwiseConv
from vitzoo.layers.mixers import Slot, register_mixer


class LargeKernel(nn.Module):
    """A depthwise convolution and one of half its kernel beside it, each with batch norm; their sum.

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / stride), ceil(W / stride), out_dim]``, ``out_dim`` a multiple of ``dim``.
    """

    def __init__(self, dim: int, out_dim: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.large = ConvNorm(dim, out_dim, size, stride, groups=dim)
        self.small = ConvNorm(dim, out_dim, size // 2, stride, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) + self.small(x)


@register_mixer("ffnified")
class FFNifiedAttention(nn.Module):
    """``values(gelu(keys(bn(W x))))``, keys and values depthwise convolutions of ``size`` x ``size``; section 3.2.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, slot: Slot, *, size: int = 7) -> None:
        super().__init__()
        dim = slot.dim
        self.query = ConvNorm(dim, dim, 1)
        self.keys = LargeKernel(dim, dim, size) if size > 3 else DepthwiseConv(dim, size)
        self.act = nn.GELU()
        self.values = LargeKernel(dim, dim, size) if size > 3 else DepthwiseConv(dim, size)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.values(self.act(self.keys(self.query(x)))))
