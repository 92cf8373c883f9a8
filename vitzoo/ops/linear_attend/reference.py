"""linear_attend as the definition says it: every query weighs every key."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(call: object) -> str | None:
    """The reference takes every call."""
    return None


def run(call) -> tuple[Tensor]:
    """(out,) of a `LinearAttendCall`."""
    wide = torch.promote_types(torch.promote_types(call.q.dtype, call.v.dtype), torch.float32)
    weights = torch.einsum("blnd,bsnd->blns", call.q.to(wide), call.k.to(wide))
    if not weights.shape[-1]:
        return (call.v.new_zeros(*call.q.shape[:3], call.v.shape[-1]),)
    total = (weights + call.eps).sum(-1, keepdim=True)
    return (torch.einsum("blns,bsne->blne", weights / total, call.v.to(wide)).to(call.v.dtype),)
