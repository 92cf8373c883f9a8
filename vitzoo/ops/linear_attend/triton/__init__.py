"""linear_attend in Triton: keys are summed to a matrix and a mean, then queries meet those.

Loaded, registered and interpreted as those of attend2d are: see `vitzoo.ops.attend2d.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import why_not


def supports(call) -> str | None:
    """None, or why these kernels cannot run a `LinearAttendCall`."""
    reason = why_not(q=call.q, k=call.k, v=call.v)
    if reason is not None:
        return reason
    B, L, N, D = call.q.shape
    S, E = call.v.shape[1], call.v.shape[3]
    if N * max(L, S) * max(D, E) >= 2**31 or B * N * max(L, S) >= 2**31:
        return "it counts numbers of one image, and tokens of all images and heads, in 32 bits: there are 2^31 or more."
    return None


def run(call) -> tuple[Tensor]:
    """(out,) of a supported `LinearAttendCall`."""
    if call.q.device.type == "cuda":
        return (torch.ops.vitzoo.linear_attend(call.q, call.k, call.v, call.eps)[0],)
    return (_Interpreted.apply(call.q, call.k, call.v, call.eps),)


def forward(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward: out in the dtype of v, and what the backward needs of it, in fp32; all contiguous."""
    from vitzoo.ops.linear_attend.triton import launch

    return launch.forward(q, k, v, eps)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, matrix: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's backward: dq, dk, dv like q, k, v."""
    from vitzoo.ops.linear_attend.triton import launch

    return launch.backward(dout, q, k, v, out, norm, matrix, mean)


torch.library.impl("vitzoo::linear_attend", "cuda")(forward)
torch.library.impl("vitzoo::linear_attend_backward", "cuda")(backward)


class _Interpreted(torch.autograd.Function):
    """The same two functions for CPU tensors, where the op itself computes the definition."""

    @staticmethod
    def forward(ctx, q, k, v, eps):
        results = forward(q, k, v, eps)
        ctx.save_for_backward(q, k, v, *results)
        return results[0]

    @staticmethod
    def backward(ctx, dout):
        return *backward(dout, *ctx.saved_tensors), None
