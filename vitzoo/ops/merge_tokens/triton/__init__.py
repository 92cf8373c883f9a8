"""merge_tokens and unmerge_tokens in Triton: one pass that reads each row once and writes each row once, without atomics.

Loaded, registered and interpreted as the kernels of attend2d are: see `vitzoo.ops.attend2d.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import no_rows, not_here


def _supports(x: Tensor, tokens: int) -> str | None:
    reason = not_here(x.device) or no_rows("x", x)
    if reason is None and (x.shape[0] * tokens >= 2**31 or tokens * x.shape[2] >= 2**31):
        reason = "it counts tokens of all images, and numbers of one, in 32 bits: there are 2^31 or more."
    return reason


def supports_merge(call) -> str | None:
    """None, or why these kernels cannot run a `MergeCall`."""
    if call.share.requires_grad and torch.is_grad_enabled():
        return "it has no gradient for share."
    return _supports(call.x, max(call.x.shape[1], call.kept.shape[1]))


def supports_unmerge(call) -> str | None:
    """None, or why these kernels cannot run an `UnmergeCall`."""
    return _supports(call.y, max(call.y.shape[1], call.source.shape[1]))


def run_merge(call) -> tuple[Tensor]:
    """(y,) of a supported `MergeCall`."""
    from vitzoo.ops.merge_tokens.registration import as_source

    source, weight = as_source(call.kept, call.moved, call.into, call.share.detach(), call.x.shape[1])
    if call.x.device.type == "cuda":
        return (torch.ops.vitzoo.collect_tokens(call.x, source, weight, call.kept.shape[1]),)
    return (_Collect.apply(call.x, source, weight, call.kept.shape[1]),)


def run_unmerge(call) -> tuple[Tensor]:
    """(x,) of a supported `UnmergeCall`."""
    weight = torch.ones_like(call.source, dtype=torch.float32)
    if call.y.device.type == "cuda":
        return (torch.ops.vitzoo.spread_tokens(call.y, call.source, weight),)
    return (_Spread.apply(call.y, call.source, weight),)


def collect(x: Tensor, source: Tensor, weight: Tensor, length: int) -> Tensor:
    """`collect_tokens` by its kernel."""
    from vitzoo.ops.merge_tokens.triton import launch

    return launch.collect(x, source, weight, length)


def spread(y: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """`spread_tokens` by its kernel."""
    from vitzoo.ops.merge_tokens.triton import launch

    return launch.spread(y, source, weight)


torch.library.impl("vitzoo::collect_tokens", "cuda")(collect)
torch.library.impl("vitzoo::spread_tokens", "cuda")(spread)


class _Collect(torch.autograd.Function):
    """The kernels for CPU tensors, where the ops themselves compute the definition."""

    @staticmethod
    def forward(ctx, x, source, weight, length):
        ctx.save_for_backward(source, weight)
        return collect(x, source, weight, length)

    @staticmethod
    def backward(ctx, dy):
        return spread(dy, *ctx.saved_tensors), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, source, weight):
        ctx.save_for_backward(source, weight)
        ctx.length = y.shape[1]
        return spread(y, source, weight)

    @staticmethod
    def backward(ctx, dx):
        return collect(dx, *ctx.saved_tensors, ctx.length), None, None
