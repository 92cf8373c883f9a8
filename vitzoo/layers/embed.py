"""From an image to a map, and from a map to the next smaller one. Sizes that do not divide are padded, never refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitzoo.layers.conv import BatchNorm
from vitzoo.layers.linear import Linear
from vitzoo.layers.maps import pad_image, pad_map

for _name in ("pad_image", "pad_map"):
    torch.fx.wrap(_name)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear layer: a convolution whose kernel is its stride.

    Args:
        dim: channels of the map.
        patch_size: pixels on a side of a patch.
        in_chans: channels of the image.
        norm: LayerNorm after it.
        pad: add zeros at the bottom and right to fill the last patches; else drop what does not fill one.

    Shape: ``[B, in_chans, H, W]`` to ``[B, ceil(H / p), ceil(W / p), dim]``; rounded down without ``pad``.
    """

    def __init__(self, dim: int, patch_size: int, in_chans: int = 3, norm: bool = False, pad: bool = True) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.multiple = self.patch_size if pad else (1, 1)
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(pad_image(image, self.multiple)).permute(0, 2, 3, 1))


class NormedPatches(nn.Module):
    """Patches of a map through one linear layer, and a batch norm: of the map or, in a stem, behind.

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / patch), ceil(W / patch), out_dim]``; rounded down without ``pad``.
    """

    def __init__(self, dim: int, out_dim: int, patch: int, *, pad: bool, stem: bool = False) -> None:
        super().__init__()
        self.stem = stem
        self.multiple = (patch, patch) if pad else (1, 1)
        self.proj = nn.Conv2d(dim, out_dim, patch, stride=patch)
        self.norm = BatchNorm(out_dim if stem else dim)

    def forward(self, x: Tensor) -> Tensor:
        # contiguous costs nothing and fixes strides, which a compiled backward pass guesses wrongly for a batch norm
        x = x.permute(0, 2, 3, 1) if self.stem else self.norm(x.contiguous()).contiguous()
        x = self.proj(pad_map(x, self.multiple).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x) if self.stem else x


class OverlapPatchEmbed(nn.Module):
    """Overlapping patches: a convolution whose kernel is larger than its stride, then LayerNorm (CSWin, PVT v2).

    Args:
        dim: channels of the map.
        kernel_size: pixels on a side of a patch.
        stride: pixels from patch to patch.
        in_chans: channels of the image.
        padding: zeros around the image; half the kernel unless given. With fewer an image whose sides do not divide by
            the stride gets more of them at the bottom and right.

    Shape: ``[B, in_chans, H, W]`` to ``[B, ceil(H / stride), ceil(W / stride), dim]``.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int, in_chans: int = 3, padding: int | None = None) -> None:
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        short = kernel_size - 1 > 2 * padding  # such a convolution rounds sizes down
        self.multiple = (stride, stride) if short else (1, 1)
        self.proj = nn.Conv2d(in_chans, dim, kernel_size, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(pad_image(image, self.multiple)).permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """Two overlapping 3x3 convolutions of stride 2, then LayerNorm (NAT's tokenizer).

    Shape: ``[B, in_chans, H, W]`` to ``[B, ceil(H / 4), ceil(W / 4), dim]``.
    """

    def __init__(self, dim: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.conv2(self.conv1(image)).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """An overlapping 3x3 convolution of stride 2, then LayerNorm (NAT's downsampler; with bias CSWin's and PVT v2's).

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / 2), ceil(W / 2), out_dim]``.
    """

    def __init__(self, dim: int, out_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=bias)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SpatialReduction(nn.Module):
    """Cells of ``ratio`` x ``ratio`` tokens through one linear layer, then LayerNorm: fewer keys for attention (PVT).

    Rows and columns that do not fill a cell are left out, as published.

    Shape: ``[B, H, W, C]`` to ``[B, H // ratio, W // ratio, C]``.
    """

    def __init__(self, dim: int, ratio: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """The four tokens of a 2x2 cell, side by side, through one linear layer (Swin).

    The cell is read column by column, (0,0), (1,0), (0,1), (1,1), which is not ``pixel_unshuffle``'s order; odd maps
    get a row or column of zeros.

    Args:
        dim: channels of the map.
        out_dim: channels of the next one.
        post_norm: LayerNorm of the result (Swin V2) instead of the concatenation (V1).

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / 2), ceil(W / 2), out_dim]``.
    """

    def __init__(self, dim: int, out_dim: int, post_norm: bool = False) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.reduction = Linear(4 * dim, out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim if post_norm else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, (2, 2))
        b, h, w, c = x.shape
        cells = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.norm(self.reduction(cells)) if self.post_norm else self.reduction(self.norm(cells))
