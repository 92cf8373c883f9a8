"""attend as the definition says it: all scores, a softmax in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._softmax import probabilities, safe_logsumexp
from vitzoo.ops.attend.point_bias import PointBias


def supports(call: object) -> str | None:
    """The reference takes every call."""
    return None


def run(call) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of an `AttendCall`."""
    bias = call.bias.defined() if isinstance(call.bias, PointBias) else call.bias
    return attend(call.q, call.k, call.v, bias, call.key_bias, call.scale)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out `[B, L, N, D]` and lse `[B, L, N]`; accumulates in fp32, or in fp64 for fp64 inputs."""
    scores = biased_scores(q, k, bias, key_bias, scale)
    lse = safe_logsumexp(scores)
    out = torch.einsum("bnls,bsnd->blnd", probabilities(scores, lse), v.to(scores.dtype))
    return out.to(q.dtype), lse.transpose(1, 2)


def biased_scores(q: Tensor, k: Tensor, bias: Tensor | None, key_bias: Tensor | None, scale: float) -> Tensor:
    """scale q . k + bias + key_bias for all pairs: `[B, N, L, S]`, at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("blnd,bsnd->bnls", q.to(wide), k.to(wide)) * scale
    if bias is not None:
        scores = scores + bias.to(wide)
    return scores if key_bias is None else scores + key_bias.to(wide)[:, None, None, :]
