"""Convolutions and batch norms on channels-last maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from timm.layers import trunc_normal_
from torch import Tensor, nn


class DepthwiseConv(nn.Conv2d):
    """A ``size`` x ``size`` convolution of every channel by itself, with bias, zeros beyond the border.

    Args:
        dim: channels C.
        size: rows and columns of the kernel, odd.
        dilation: distance between the positions that it reads.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, dim: int, size: int = 3, dilation: int = 1) -> None:
        super().__init__(dim, dim, size, padding=size // 2 * dilation, groups=dim, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm of a map ``[B, H, W, C]``."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # its name in PyTorch
        """Nothing: a permutation has counted the dimensions, and FX cannot trace a question about them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvNorm(nn.Module):
    """A convolution, then batch norm.

    Args:
        dim: channels of the map.
        out_dim: channels of the next one.
        size: rows and columns of the kernel, odd.
        stride: tokens from one position of the kernel to the next.
        groups: groups of channels that do not mix.
        bias: learn a bias before the norm.

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / stride), ceil(W / stride), out_dim]``.
    """

    def __init__(self, dim: int, out_dim: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, size, stride=stride, padding=size // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class ConvNormStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with batch norm, a GELU between (FFNet, AttNet; with bias BiFormer).

    Shape: ``[B, in_chans, H, W]`` to ``[B, ceil(H / 4), ceil(W / 4), out_dim]``, with ``dim`` channels between.
    """

    def __init__(self, in_chans: int, dim: int, out_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim, stride=2, bias=bias)
        self.act = nn.GELU()
        self.conv2 = ConvNorm(dim, out_dim, stride=2, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv2(self.act(self.conv1(image.permute(0, 2, 3, 1))))


class DeepStem(nn.Sequential):
    """3x3 convolutions with batch norm, GELUs between them: an image ``[B, in_chans, H, W]`` to a map ``[B, h, w, C]``.

    Args:
        in_chans: channels of the image.
        widths: channels behind each convolution, the last ones C.
        strides: of each convolution, 1 or 2; sizes are rounded up.
    """

    def __init__(self, in_chans: int, widths: Sequence[int], strides: Sequence[int]) -> None:
        super().__init__()
        for before, after, stride in zip((in_chans, *widths), widths, strides, strict=False):
            if len(self):
                self.append(nn.GELU())
            self.append(ConvNorm(before, after, stride=stride))

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.permute(0, 2, 3, 1))


def init_by_fan_out(module: nn.Module, linear: bool = False) -> None:
    """Normal weights of variance 2 / fan-out (He et al. 2015, arXiv:1502.01852) and zero biases for all convolutions.

    Args:
        module: whatever holds them.
        linear: linear layers too, for those that stand for a 1x1 convolution.
    """
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            fan_out = math.prod(each.kernel_size) * each.out_channels // each.groups
        elif linear and isinstance(each, nn.Linear):
            fan_out = each.out_features
        else:
            continue
        nn.init.normal_(each.weight, std=math.sqrt(2 / fan_out))
        if each.bias is not None:
            nn.init.zeros_(each.bias)


def init_truncated(module: nn.Module) -> None:
    """Truncated normal 0.02 for all convolutions, zero biases."""
    for each in module.modules():
        if isinstance(each, nn.Conv2d):
            trunc_normal_(each.weight, std=0.02)
            if each.bias is not None:
                nn.init.zeros_(each.bias)
