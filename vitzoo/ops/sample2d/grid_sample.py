"""sample2d through PyTorch's `grid_sample`, one picture for each image and group."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._bilinear import bilinear


def supports(call: object) -> str | None:
    """Takes every call."""
    return None


def run(call) -> tuple[Tensor]:
    """(out,) of a `Sample2dCall`."""
    x, points = call.x, call.points
    B, H, W, G, C = x.shape
    S = points.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)  # the map too: grid_sample takes one dtype for both
    pictures = x.to(wide).permute(0, 3, 4, 1, 2).reshape(B * G, C, H, W)
    grid = points.to(wide).flip(-1).transpose(1, 2).reshape(B * G, S, 1, 2)  # column first
    out = bilinear(pictures, grid)
    return (out.reshape(B, G, C, S).permute(0, 3, 1, 2).to(x.dtype),)
