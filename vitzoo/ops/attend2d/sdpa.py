"""attend2d through PyTorch: views and regions on concrete sizes, one graph for all sizes while a graph is captured."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops.attend2d import eager, traced


def supports(call) -> str | None:
    """Takes every call."""
    return None


def run(call) -> tuple[Tensor, Tensor | None]:
    """(out `[B, H, W, N, D]`, lse `[B, H, W, N]` or None) of an `Attend2dCall`."""
    if call.q.is_meta:  # only shapes are asked for, and the registered op states them
        out, lse = torch.ops.vitzoo.attend2d(call.q, call.k, call.v, call.bias, call.pattern.to_ints(), call.scale)
        return out, lse if call.return_lse else None
    form = traced if torch.compiler.is_compiling() else eager
    return form.attend2d(call.q, call.k, call.v, call.pattern, call.bias, call.scale, call.return_lse)
