"""The dispatcher's view of attend2d: `torch.ops.vitzoo.attend2d`, one opaque node in a captured graph.

Fused implementations call it, so that torch.compile, meta tensors and autograd know shapes and gradients without looking
inside: each registers a kernel for its device. The CPU kernels here are the definition in plain PyTorch, with the gradient
written out; they say what a fused kernel must compute. A pattern travels as `Pattern.to_ints()`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops.attend2d import reference
from vitzoo.patterns import Pattern

torch.library.define(
    "vitzoo::attend2d",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, int[] pattern, float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "vitzoo::attend2d_backward",
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, int[] pattern, "
    "float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
)


@torch.library.impl("vitzoo::attend2d", "cpu")
def _forward(q, k, v, bias, pattern, scale):
    out, lse = reference.attend2d(q, k, v, Pattern.from_ints(pattern), bias, scale)
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("vitzoo::attend2d")
def _forward_shapes(q, k, v, bias, pattern, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.impl("vitzoo::attend2d_backward", "cpu")
def _backward(dout, dlse, q, k, v, bias, out, lse, pattern, scale):
    """With P the softmax and S the scores: dS = P (dP - sum(dout out) + dlse), dP = dout v^T, dbias its sum by offset."""
    pattern = Pattern.from_ints(pattern)
    scores = reference.masked_scores(q, k, pattern, bias, scale)
    wide = scores.dtype
    dout = q.new_zeros(q.shape, dtype=wide) if dout is None else dout.to(wide)
    softmax = torch.exp(scores - lse.permute(0, 3, 1, 2)[..., None, None])
    delta = (dout * out.to(wide)).sum(-1)
    delta = delta if dlse is None else delta - dlse.to(wide)
    dv = torch.einsum("bnyxvu,byxnd->bvund", softmax, dout)
    dscore = softmax * (torch.einsum("byxnd,bvund->bnyxvu", dout, v.to(wide)) - delta.permute(0, 3, 1, 2)[..., None, None])
    dq = torch.einsum("bnyxvu,bvund->byxnd", dscore, k.to(wide)) * scale
    dk = torch.einsum("bnyxvu,byxnd->bvund", dscore, q.to(wide)) * scale
    dbias = q.new_empty(0) if bias is None else _by_offset(dscore.sum(0), bias, pattern)
    return dq.to(q.dtype).contiguous(), dk.to(q.dtype).contiguous(), dv.to(q.dtype).contiguous(), dbias


def _by_offset(dscore: Tensor, bias: Tensor, pattern: Pattern) -> Tensor:
    """dscore `[N, H, W, H, W]` summed into the table's entries, in a fixed order."""
    H, W = dscore.shape[1:3]
    _, (dy, dx) = reference.pair_tables(pattern, H, W, dscore.device)
    by_y, by_x = (
        torch.nn.functional.one_hot(d, size).to(dscore.dtype) for d, size in ((dy, bias.shape[1]), (dx, bias.shape[2]))
    )
    return torch.einsum("nyxvu,yva,xub->nab", dscore, by_y, by_x).to(bias.dtype).contiguous()


@torch.library.register_fake("vitzoo::attend2d_backward")
def _backward_shapes(dout, dlse, q, k, v, bias, out, lse, pattern, scale):
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup_context(ctx, inputs, output):
    q, k, v, bias, pattern, scale = inputs
    ctx.save_for_backward(q, k, v, bias, *output)
    ctx.pattern, ctx.scale = pattern, scale
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    bias = ctx.saved_tensors[3]
    gradients = torch.ops.vitzoo.attend2d_backward(dout, dlse, *ctx.saved_tensors, ctx.pattern, ctx.scale)
    dq, dk, dv, dbias = gradients
    return dq, dk, dv, None if bias is None else dbias, None, None


torch.library.register_autograd("vitzoo::attend2d", _autograd, setup_context=_setup_context)
