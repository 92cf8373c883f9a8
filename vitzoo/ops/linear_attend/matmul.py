"""linear_attend as two batched products: keys times values, then queries times that, with the mean key as a last column."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(call: object) -> str | None:
    """Takes every call."""
    return None


def run(call) -> tuple[Tensor]:
    """(out,) of a `LinearAttendCall`."""
    wide = torch.promote_types(torch.promote_types(call.q.dtype, call.v.dtype), torch.float32)
    q, k, v = (x.to(wide).transpose(1, 2) for x in (call.q, call.k, call.v))
    keys = k.shape[2]
    if not torch.compiler.is_compiling() and keys == 0:
        return (call.v.new_zeros(*call.q.shape[:3], call.v.shape[-1]),)
    # over S before q comes: sums over a large map are far from 1, where eps and fp32 are at home
    summed = torch.cat([k.transpose(-2, -1) @ v / keys, k.mean(dim=2).unsqueeze(-1)], dim=-1)  # [B, N, D, E + 1]
    out = q @ summed
    out = out[..., :-1] / (out[..., -1:] + call.eps)
    return (out.transpose(1, 2).to(call.v.dtype),)
