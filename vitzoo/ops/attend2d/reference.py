"""attend2d as the definition says it: all pairs, a mask from the span rule, a softmax in fp32. Quadratic in the map."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.patterns import Pattern, Span


def supports(call: object) -> str | None:
    """The reference takes every call on concrete sizes."""
    return None


def run(call) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of an `Attend2dCall`."""
    return attend2d(call.q, call.k, call.v, call.pattern, call.bias, call.scale)


def attend2d(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out `[B, H, W, N, D]` and lse `[B, H, W, N]`; accumulates in fp32, or in fp64 for fp64 inputs."""
    scores = masked_scores(q, k, pattern, bias, scale)
    lse = torch.logsumexp(scores, (-2, -1))
    out = torch.einsum("bnyxvu,bvund->byxnd", torch.exp(scores - lse[..., None, None]), v.to(scores.dtype))
    return out.to(q.dtype), lse.permute(0, 2, 3, 1)


def masked_scores(q: Tensor, k: Tensor, pattern: Pattern, bias: Tensor | None, scale: float) -> Tensor:
    """scale q . k + bias for all pairs, -inf for those that the pattern leaves out: `[B, N, H, W, H, W]`, at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("byxnd,bvund->bnyxvu", q.to(wide), k.to(wide)) * scale
    (sees_y, sees_x), (dy, dx) = pair_tables(pattern, q.shape[1], q.shape[2], q.device)
    if bias is not None:
        scores = scores + bias.to(wide)[:, dy[:, None, :, None], dx[None, :, None, :]]
    return scores.masked_fill(~(sees_y[:, None, :, None] & sees_x[None, :, None, :]), -torch.inf)


def pair_tables(pattern: Pattern, H: int, W: int, device: torch.device) -> tuple[tuple, tuple]:
    """Per axis, over (query, key): who sees whom, and the row or column of the bias table that belongs to the pair."""
    axes = [pair_table(span, n, device) for span, n in ((pattern.rows, H), (pattern.cols, W))]
    return tuple(sees for sees, _ in axes), tuple(offset for _, offset in axes)


def pair_table(span: Span, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The span rule, line by line, for all (i, j): sees `[n, n]` bool, and position offset plus reach `[n, n]`."""
    reach, span = span.reach(n), span.resolve(n)
    i, j = torch.arange(n, device=device)[:, None], torch.arange(n, device=device)[None, :]
    m = i // span.step
    start = (m - span.shift).div(span.stride, rounding_mode="floor") * span.stride + span.shift
    start = start + span.stride // 2 - span.size // 2
    if span.edge == "clamp":
        length = (n - i % span.step + span.step - 1) // span.step
        start = torch.minimum(start.clamp(min=0), length - span.size)
    sees = (j % span.step == i % span.step) & (start <= j // span.step) & (j // span.step < start + span.size)
    return sees, (j // span.step - m).clamp(-reach, reach) + reach
