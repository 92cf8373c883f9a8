"""sample2d in Triton: a gather, and for the map's gradient a product with weights computed on the way.

Loaded, registered and interpreted as the kernels of attend2d are: see `vitzoo.ops.attend2d.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import DTYPES, no_rows, not_here


def supports(call) -> str | None:
    """None, or why these kernels cannot run a `Sample2dCall`."""
    reason = not_here(call.x.device) or no_rows("x", call.x)
    if reason is not None:
        return reason
    if call.points.dtype not in DTYPES:
        return f"it takes points of float16, bfloat16 or float32, got {call.points.dtype}."
    B, H, W, G, C = call.x.shape
    S = call.points.shape[1]
    if max(H * W, S) * G * C >= 2**31 or B * G * max(H * W, S) >= 2**31:
        return "it counts elements of an image, and tokens of all images, in 32 bits: there are 2^31 or more."
    return None


def run(call) -> tuple[Tensor]:
    """(out `[B, S, G, C]`,) of a supported `Sample2dCall`."""
    if call.x.device.type == "cuda":
        return (torch.ops.vitzoo.sample2d(call.x, call.points),)
    return (_Interpreted.apply(call.x, call.points),)


def forward(x: Tensor, points: Tensor) -> Tensor:
    """The op's forward: out in the dtype of x, contiguous."""
    from vitzoo.ops.sample2d.triton import launch

    return launch.forward(x, points)


def backward(dout: Tensor, x: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The op's backward: dx like x, dpoints like points, both contiguous."""
    from vitzoo.ops.sample2d.triton import launch

    return launch.backward(dout, x, points)


torch.library.impl("vitzoo::sample2d", "cuda")(forward)
torch.library.impl("vitzoo::sample2d_backward", "cuda")(backward)


class _Interpreted(torch.autograd.Function):
    """The same two functions for CPU tensors, where the op itself computes the definition."""

    @staticmethod
    def forward(ctx, x, points):
        ctx.save_for_backward(x, points)
        return forward(x, points)

    @staticmethod
    def backward(ctx, dout):
        return backward(dout, *ctx.saved_tensors)
