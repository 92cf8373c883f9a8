"""Batch norms: folded into the convolutions beside them in eval mode, their statistics kept where a block runs twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def may_fold(x: Tensor, norms: Iterable[nn.Module], others: Iterable[nn.Module] = ()) -> bool:
    """Whether batch norms may be folded in a call on ``x``: in eager inference on a CPU, and in a graph.

    In a graph because batch norm on a channels-last map of symbolic size compares strides, which narrows an export; on a CPU
    because every pass over a map costs. Never where a norm is in training mode or of another class (synchronised, frozen),
    nor where a hook would miss what it watches.

    Args:
        x: the map.
        norms: what would be folded.
        others: modules that are then bypassed too.

    Returns:
        True or False; False for what FX traces symbolically, so that it keeps modules apart.
    """
    norms = tuple(norms)
    if not all(type(norm) is nn.BatchNorm2d and not norm.training and norm.track_running_stats for norm in norms):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks for m in (*norms, *others)):
        return False
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    return type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch norm in eval mode multiplies channels by, and what it adds: two tensors ``[C]``."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside, the batch norms of ``module`` give what they gave before and leave their running statistics alone.

    For the recomputation of a gradient checkpoint, which would count every batch twice.
    """
    norms: list[Any] = [m for m in module.modules() if isinstance(m, BATCH_NORMS) and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # not track_running_stats, without which autograd saves fewer tensors than it did the first time
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
