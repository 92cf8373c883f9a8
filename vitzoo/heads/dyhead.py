"""Dynamic Head. Dai et al. 2021, arXiv:2106.08322: attention over scales, places and tasks of a pyramid, in turn.

A pyramid is a tensor ``F[level, place, channel]``. One block computes ``W(F) = pi_C(pi_S(pi_L(F) F) F) F`` (eq. 2):

- spatial (eq. 4): a 3x3 deformable, modulated convolution at each place, summed over the neighbouring levels; offsets and
  masks come from the level itself;
- scale (eq. 3): each of these summands is weighted by ``hard_sigmoid(relu(linear(mean over places)))``;
- task (eq. 5): ``max(a1 F_c + b1, a2 F_c + b2)`` a channel, with a and b from the mean of the map (dynamic ReLU).

As in the authors' code the spatial sum comes before the scale weights. Deviation: neighbours are resized to the level's grid
before the deformable convolution (as section 3.1 says of the tensor), so that all offsets are in pixels of one grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

__all__ = ["DynamicHead", "DynamicHeadBlock"]


class _Deformed(nn.Module):
    """3x3 deformable convolution with given offsets and masks, then GroupNorm."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.norm = nn.GroupNorm(groups, channels)
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        return self.norm(deform_conv2d(x, offset.to(x.dtype), self.weight.to(x.dtype), padding=(1, 1), mask=mask.to(x.dtype)))


class _TaskAware(nn.Module):
    """Dynamic ReLU: ``max(a1 x + b1, a2 x + b2)`` a channel, (a1, a2, b1, b2) = (1, 0, 0, 0) plus what the mean says."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, max(1, channels // reduction))
        self.expand = nn.Linear(max(1, channels // reduction), 4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        theta = 2 * F.hardsigmoid(3 * self.expand(F.relu(self.reduce(x.mean((2, 3)))))) - 1  # in -1..1, as in DyReLU
        a1, b1, a2, b2 = theta[..., None, None].chunk(4, dim=1)
        return torch.maximum(x * (1 + a1) + b1 / 2, x * a2 + b2 / 2)


class DynamicHeadBlock(nn.Module):
    """One block on maps ``[B, C, h_i, w_i]``, finest first; the maps keep their sizes.

    Args:
        channels: C of every map.
        groups: of the GroupNorms.
    """

    def __init__(self, channels: int, groups: int = 16) -> None:
        super().__init__()
        self.finer, self.own, self.coarser = (_Deformed(channels, groups) for _ in range(3))
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)
        self.scale = nn.Linear(channels, 1)
        self.task = _TaskAware(channels)
        nn.init.zeros_(self.offset.weight)  # begins as a plain convolution
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for i, x in enumerate(maps):
            guide = self.offset(x)
            offset, mask = guide[:, :18], guide[:, 18:].sigmoid()
            summands = [self.own(x, offset, mask)]
            if i:
                summands.append(self.finer(_onto(maps[i - 1], x), offset, mask))
            if i + 1 < len(maps):
                summands.append(self.coarser(_onto(maps[i + 1], x), offset, mask))
            weights = [F.hardsigmoid(F.relu(self.scale(y.mean((2, 3)))))[..., None, None] for y in summands]
            mean = torch.stack([w * y for w, y in zip(weights, summands, strict=True)]).mean(0)
            out.append(self.task(mean))
        return out


class DynamicHead(nn.Module):
    """``blocks`` of :class:`DynamicHeadBlock`, as a neck: maps in, maps of the same shapes out.

    Args:
        channels: C of every map.
        blocks: how many (the paper: 6).
        groups: of the GroupNorms; must divide ``channels``.
    """

    def __init__(self, channels: int, blocks: int = 6, groups: int = 16) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"A dynamic head's {groups} norm groups do not divide {channels} channels. Give another width.")
        self.blocks = nn.ModuleList(DynamicHeadBlock(channels, groups) for _ in range(blocks))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``[B, C, h_i, w_i]``, finest first."""
        out = list(maps)
        for block in self.blocks:
            out = block(out)
        return out


def _onto(x: Tensor, like: Tensor) -> Tensor:
    """``x`` on the grid of ``like``: averaged where that is coarser, bilinear where it is finer."""
    size = (like.shape[-2], like.shape[-1])
    if x.shape[-2] > size[0] or x.shape[-1] > size[1]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
