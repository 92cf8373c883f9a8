"""Convolutions on channels-last maps."""

from __future__ import annotations

from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """A ``size`` x ``size`` convolution of every channel by itself, with bias, zeros beyond the border.

    Args:
        dim: channels C.
        size: rows and columns of the kernel, odd.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, dim: int, size: int = 3) -> None:
        super().__init__(dim, dim, size, padding=size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
