"""channel_attend as the definition says it."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(call: object) -> str | None:
    """The reference takes every call."""
    return None


def run(call) -> tuple[Tensor]:
    """(out,) of a `ChannelAttendCall`."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = (x.to(wide) for x in (call.q, call.k, call.v))
    scores = call.scale * torch.einsum("bsni,bsnj->bnij", q, k)
    return (torch.einsum("bnij,blnj->blni", scores.softmax(-1), v).to(call.q.dtype),)
