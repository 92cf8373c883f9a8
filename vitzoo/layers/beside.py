"""A class token that travels beside a map, in the second half of its channels, so that a pyramid's stage can have one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.blocks import Block
from vitzoo.layers.conv import ConvNorm
from vitzoo.layers.maps import resize_positions
from vitzoo.layers.mixers import OnTokens

torch.fx.wrap("resize_positions")


class ClassBlock(Block):
    """A block on a class token and a map's tokens, which lie in one tensor: the second half of the channels is the class's.

    Shape: ``[B, H, W, 2 C]``, unchanged, the second half the same everywhere.
    """

    def forward(self, x: Tensor, *grid: int) -> Tensor:
        patches, classes = x.chunk(2, dim=-1)
        grid = (x.shape[1], x.shape[2]) if isinstance(self.attn, OnTokens) else ()
        tokens = super().forward(torch.cat([classes[:, 0, :1], patches.flatten(1, 2)], dim=1), *grid)
        return beside(tokens[:, 1:].reshape(patches.shape), tokens[:, :1])


def beside(patches: Tensor, classes: Tensor) -> Tensor:
    """A map ``[B, H, W, C]`` and a class token ``[B or 1, 1, C]`` as ``[B, H, W, 2 C]``."""
    return torch.cat([patches, classes[:, None].expand_as(patches)], dim=-1)


class ClassNorm(nn.LayerNorm):
    """A map and a class token, normed, as one map: that of the patches, moved until its mean is the class token."""

    def forward(self, x: Tensor) -> Tensor:
        patches, classes = x.chunk(2, dim=-1)
        patches, classes = super().forward(patches), super().forward(classes)
        return patches - patches.mean(dim=(1, 2), keepdim=True) + classes


class ConvEmbedding(nn.Module):
    """3x3 convolutions with batch norm, a ReLU behind each; learned positions; a class token where ``classes``.

    Shape: ``[B, H, W, widths[0]]`` to ``[B, ceil(H / s), ceil(W / s), C]``, with a class token ``2 C``, s the strides' product.
    """

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...], grid: tuple[int, int], classes: bool = False) -> None:
        super().__init__()
        layers = zip(widths[:-1], widths[1:], strides, strict=True)
        self.convs = nn.ModuleList(ConvNorm(a, b, stride=stride, bias=True) for a, b, stride in layers)
        self.grid_size, self.prefix = grid, int(classes)
        self.cls_token = nn.Parameter(torch.empty(1, 1, widths[-1])) if classes else None
        self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + grid[0] * grid[1], widths[-1]))

    def init_weights(self) -> None:
        """Truncated normal 0.02 for positions and class token."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        x = x + resize_positions(self.pos_embed[:, self.prefix :], x, self.grid_size, mode="bilinear")
        return x if self.cls_token is None else beside(x, self.cls_token + self.pos_embed[:, :1])
