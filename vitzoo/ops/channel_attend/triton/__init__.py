"""channel_attend in Triton: tokens are summed to scores of channels, whose softmax they then meet.

Loaded, registered and interpreted as those of attend2d are: see `vitzoo.ops.attend2d.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import why_not


def supports(call) -> str | None:
    """None, or why these kernels cannot run a `ChannelAttendCall`."""
    reason = why_not(q=call.q, k=call.k, v=call.v)
    if reason is not None:
        return reason
    B, S, N, D = call.q.shape
    L, E = call.v.shape[1], call.v.shape[3]
    if N * max(L, S) * max(D, E) >= 2**31 or B * N * max(L, S, D * E) >= 2**31:
        return "it counts numbers of one image, tokens of all images and pairs of channels in 32 bits: there are 2^31 or more."
    return None


def run(call) -> tuple[Tensor]:
    """(out,) of a supported `ChannelAttendCall`."""
    if call.q.device.type == "cuda":
        return (torch.ops.vitzoo.channel_attend(call.q, call.k, call.v, call.scale)[0],)
    return (_Interpreted.apply(call.q, call.k, call.v, call.scale),)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The op's forward: out in the dtype of q, and the softmax `[B, N, D, E]` in fp32; both contiguous."""
    from vitzoo.ops.channel_attend.triton import launch

    return launch.forward(q, k, v, scale)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The op's backward: dq, dk, dv like q, k, v."""
    from vitzoo.ops.channel_attend.triton import launch

    return launch.backward(dout, q, k, v, weights, scale)


torch.library.impl("vitzoo::channel_attend", "cuda")(forward)
torch.library.impl("vitzoo::channel_attend_backward", "cuda")(backward)


class _Interpreted(torch.autograd.Function):
    """The same two functions for CPU tensors, where the op itself computes the definition."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, weights = forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dout):
        return *backward(dout, *ctx.saved_tensors, ctx.scale), None
