"""A class token that travels beside a map, in the second half of its channels, so that a pyramid's stage can have one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitzoo.layers.blocks import Block
from vitzoo.layers.mixers import OnTokens


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
