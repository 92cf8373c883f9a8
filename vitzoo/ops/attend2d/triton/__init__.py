"""attend2d in Triton: one rule, two schedules.

Importing this package imports neither triton nor the kernels: `supports` says whether they can run a call, and the first call
loads them. CUDA calls pass through `torch.ops.vitzoo.attend2d`, defined in `registration`, whose CUDA kernels are registered
here, so that torch.compile and autograd see one opaque node. With `TRITON_INTERPRET=1` set before triton is imported, Triton's
interpreter runs the same kernels on CPU tensors; that is how CI checks them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import DTYPES, why_not
from vitzoo.patterns import Pattern


def supports(call) -> str | None:
    """None, or why these kernels cannot run an `Attend2dCall`."""
    reason = why_not(q=call.q, k=call.k, v=call.v)
    if reason is not None:
        return reason
    if call.bias is not None and call.bias.dtype not in DTYPES:
        return f"it takes a bias of float16, bfloat16 or float32, got {call.bias.dtype}."
    if call.q.shape[:-1].numel() >= 2**31:  # the number of programs, and tokens of all images, are counted in 32 bits
        return "batch x height x width x heads is 2^31 or more."
    return None


def run(call) -> tuple[Tensor, Tensor]:
    """(out `[B, H, W, N, D]`, lse `[B, H, W, N]`) of a supported `Attend2dCall`."""
    arguments = call.q, call.k, call.v, call.bias, call.pattern.to_ints(), call.scale
    if call.q.device.type == "cuda":
        return torch.ops.vitzoo.attend2d(*arguments)
    return _Interpreted.apply(*arguments)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, pattern: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """The op's forward: out in the dtype of q, lse in fp32, both contiguous; `pattern` as `Pattern.to_ints` wrote it."""
    from vitzoo.ops.attend2d.triton import launch

    return launch.forward(q, k, v, Pattern.from_ints(pattern), bias, scale)


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
    pattern: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op's backward: dq, dk, dv like q, and dbias like bias (empty where there is no bias)."""
    from vitzoo.ops.attend2d.triton import launch

    dq, dk, dv, dbias = launch.backward(dout, dlse, q, k, v, Pattern.from_ints(pattern), bias, scale, out, lse)
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


torch.library.impl("vitzoo::attend2d", "cuda")(forward)
torch.library.impl("vitzoo::attend2d_backward", "cuda")(backward)


class _Interpreted(torch.autograd.Function):
    """The same two functions for CPU tensors, where the op itself computes the definition."""

    @staticmethod
    def forward(ctx, q, k, v, bias, pattern, scale):
        out, lse = forward(q, k, v, bias, pattern, scale)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.pattern, ctx.scale = pattern, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        bias = ctx.saved_tensors[3]
        dq, dk, dv, dbias = backward(dout, dlse, *ctx.saved_tensors, ctx.pattern, ctx.scale)
        return dq, dk, dv, None if bias is None else dbias, None, None
