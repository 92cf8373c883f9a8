"""attend_routed in Triton: keys and values of the chosen regions are read where they lie.

Loaded, registered and interpreted as the kernels of attend2d are: see `vitzoo.ops.attend2d.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import why_not


def supports(call) -> str | None:
    """None, or why these kernels cannot run an `AttendRoutedCall`."""
    reason = why_not(q=call.q, k=call.k, v=call.v)
    if reason is not None:
        return reason
    if call.q.shape[:-1].numel() * call.graph.shape[-1] >= 2**31 or call.k.shape[:-1].numel() >= 2**31:
        return "it counts tokens of all images and their choices in 32 bits: there are 2^31 or more."
    if call.q[0:1].numel() // call.q.shape[-1] * call.v.shape[-1] >= 2**31:
        return "one image of the output holds 2^31 elements or more."
    return None


def run(call) -> tuple[Tensor]:
    """(out `[B, H, W, N, E]`,) of a supported `AttendRoutedCall`."""
    arguments = call.q, call.k, call.v, call.graph, list(call.regions), list(call.key_regions), call.scale
    if call.q.device.type == "cuda":
        return (torch.ops.vitzoo.attend_routed(*arguments)[0],)
    return (_Interpreted.apply(*arguments)[0],)


def forward(
    q: Tensor, k: Tensor, v: Tensor, graph: Tensor, regions: list[int], key_regions: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The op's forward: out in the dtype of q, lse in fp32, both contiguous."""
    from vitzoo.ops.attend_routed.triton import launch

    return launch.forward(q, k, v, graph, (regions[0], regions[1]), (key_regions[0], key_regions[1]), scale)


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, graph: Tensor, out: Tensor, lse: Tensor,
    regions: list[int], key_regions: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op's backward: dq, dk, dv like q, k, v."""
    from vitzoo.ops.attend_routed.triton import launch

    grids = (regions[0], regions[1]), (key_regions[0], key_regions[1])
    return launch.backward(dout, dlse, q, k, v, graph, out, lse, *grids, scale)


torch.library.impl("vitzoo::attend_routed", "cuda")(forward)
torch.library.impl("vitzoo::attend_routed_backward", "cuda")(backward)


class _Interpreted(torch.autograd.Function):
    """The same two functions for CPU tensors, where the op itself computes the definition."""

    @staticmethod
    def forward(ctx, q, k, v, graph, *settings):
        out, lse = forward(q, k, v, graph, *settings)
        ctx.save_for_backward(q, k, v, graph, out, lse)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return *backward(dout, dlse, *ctx.saved_tensors, *ctx.settings), None, None, None, None
