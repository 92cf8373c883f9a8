"""attend2d once more, dense and in fp64, from `Span.keys`: what every test of the kernels compares with."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.patterns import Pattern


def seen(pattern: Pattern, H: int, W: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Per axis `[n, n]`: who sees whom, and the table entry of each pair that does (0 elsewhere)."""
    axes = []
    for span, n in ((pattern.rows, H), (pattern.cols, W)):
        step, reach = span.resolve(n).step, span.reach(n)
        sees, entry = torch.zeros(n, n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.long)
        for i in range(n):
            for j in span.keys(i, n):
                sees[i, j], entry[i, j] = True, j // step - i // step + reach
        axes.append((sees, entry))
    return tuple(axes)


def attend2d(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """out and lse in the dtype of the inputs, every operation rounded to it: in fp64 the truth, in bf16 plain PyTorch."""
    H, W = q.shape[1:3]
    (sees_y, entry_y), (sees_x, entry_x) = ((a.to(q.device), b.to(q.device)) for a, b in seen(pattern, H, W))
    scores = torch.einsum("byxnd,bvund->bnyxvu", q, k) * scale
    if bias is not None:
        scores = scores + bias.to(q.dtype)[:, entry_y[:, None, :, None], entry_x[None, :, None, :]]
    scores = scores.masked_fill(~(sees_y[:, None, :, None] & sees_x[None, :, None, :]), -torch.inf).flatten(-2)
    lse = torch.logsumexp(scores, -1)
    p = torch.softmax(scores, -1).unflatten(-1, (H, W))
    return torch.einsum("bnyxvu,bvund->byxnd", p, v), lse.permute(0, 2, 3, 1)


def gradients(q, k, v, pattern, bias, scale, dout, dlse) -> dict[str, Tensor]:
    """out, lse and all gradients of `sum(out * dout) + sum(lse * dlse)`; `bias` and `dlse` may be None."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *([] if bias is None else [bias]))]
    out, lse = attend2d(*leaves[:3], pattern, leaves[3] if bias is not None else None, scale)
    loss = (out * dout).sum() if dlse is None else (out * dout).sum() + (lse * dlse).sum()
    names = ("dq", "dk", "dv", "dbias")[: len(leaves)]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))}
