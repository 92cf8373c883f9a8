"""selective_scan in Triton: a program walks through the tokens of some channels, a tile of them at a time.

Loaded, registered and interpreted as those of attend2d are: see `vitzoo.ops.attend2d.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import DTYPES, no_rows, not_here


def supports(call) -> str | None:
    """None, or why these kernels cannot run a `SelectiveScanCall`."""
    reason = not_here(call.u.device) or no_rows("u", call.u) or no_rows("delta", call.delta)
    for name, tensor in (("a", call.a), ("b", call.b)):
        if reason is None and tensor.dtype not in DTYPES:
            reason = f"it takes {name} in float16, bfloat16 or float32, got {tensor.dtype}."
    if reason is None and call.u[0:1].numel() >= 2**31:
        reason = "one image of the states holds 2^31 elements or more."
    return reason


def run(call) -> tuple[Tensor]:
    """(states,) of a supported `SelectiveScanCall`."""
    if call.u.device.type == "cuda":
        return (torch.ops.vitzoo.selective_scan(*call),)
    return (_Interpreted.apply(*call),)


def forward(u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The op's forward: states in fp32, contiguous."""
    from vitzoo.ops.selective_scan.triton import launch

    return launch.forward(u, delta, a, b)


def backward(
    dstates: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's backward: du, ddelta, da, db like u, delta, a, b."""
    from vitzoo.ops.selective_scan.triton import launch

    return launch.backward(dstates, u, delta, a, b, states)


torch.library.impl("vitzoo::selective_scan", "cuda")(forward)
torch.library.impl("vitzoo::selective_scan_backward", "cuda")(backward)


class _Interpreted(torch.autograd.Function):
    """The same two functions for CPU tensors, where the op itself computes the definition."""

    @staticmethod
    def forward(ctx, u, delta, a, b):
        states = forward(u, delta, a, b)
        ctx.save_for_backward(u, delta, a, b, states)
        return states

    @staticmethod
    def backward(ctx, grad):
        return backward(grad, *ctx.saved_tensors)
