"""match in Triton: a running maximum over tiles of partners; the products are never stored.

Loaded, registered and interpreted as the kernels of attend2d are: see `vitzoo.ops.attend2d.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import no_rows, not_here


def supports(call) -> str | None:
    """None, or why these kernels cannot run a `MatchCall`."""
    reason = not_here(call.a.device) or no_rows("a", call.a) or no_rows("b", call.b)
    if reason is None and call.a.shape[0] * max(call.a.shape[1], call.b.shape[1]) >= 2**31:
        reason = "it counts tokens of all images in 32 bits: there are 2^31 or more."
    if reason is None and call.b.shape[1] == 0:
        reason = "there is nothing to match with."
    return reason


def run(call) -> tuple[Tensor, Tensor]:
    """(best, index) of a supported `MatchCall`."""
    if call.a.device.type == "cuda":
        return torch.ops.vitzoo.match(call.a, call.b)
    return _Interpreted.apply(call.a, call.b)


def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The op's forward: best in the dtype of a, index in int64, both contiguous."""
    from vitzoo.ops.match.triton import launch

    return launch.forward(a, b)


torch.library.impl("vitzoo::match", "cuda")(forward)


class _Interpreted(torch.autograd.Function):
    """The same for CPU tensors, where the op itself computes the definition."""

    @staticmethod
    def forward(ctx, a, b):
        best, index = forward(a, b)
        ctx.save_for_backward(a, b, index)
        ctx.mark_non_differentiable(index)
        return best, index

    @staticmethod
    def backward(ctx, dbest, _):
        from vitzoo.ops.match.gradient import backward

        return backward(dbest, *ctx.saved_tensors)
