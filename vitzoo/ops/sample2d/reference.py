"""sample2d as the definition says it: every token weighs in by how near it is."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._bilinear import nearness


def supports(call: object) -> str | None:
    """The reference takes every call."""
    return None


def run(call) -> tuple[Tensor]:
    """(out,) of a `Sample2dCall`."""
    return (sample(call.x, call.points),)


def sample(x: Tensor, points: Tensor) -> Tensor:
    """out `[B, S, G, C]` in the dtype of x, in fp32 or wider on the way."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, cols = (nearness(points[..., axis].to(wide), x.shape[1 + axis]) for axis in (0, 1))
    return torch.einsum("bsgi,bsgj,bijgc->bsgc", rows, cols, x.to(wide)).to(x.dtype)
