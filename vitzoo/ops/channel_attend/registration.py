"""The dispatcher's view of channel_attend: `torch.ops.vitzoo.channel_attend`, one opaque node in a captured graph.

Fused implementations call it and register a kernel for their device; the CPU kernels here are the definition in plain
PyTorch, with the gradient written out. Beside out they give the softmax `[B, N, D, E]`, in at least fp32.
"""

from __future__ import annotations

import torch

torch.library.define("vitzoo::channel_attend", "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor weights)")
torch.library.define(
    "vitzoo::channel_attend_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor weights, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.impl("vitzoo::channel_attend", "cpu")
def _forward(q, k, v, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bsni,bsnj->bnij", q.to(wide), k.to(wide)) * scale
    weights = scores.softmax(-1).contiguous()
    return torch.einsum("bnij,blnj->blni", weights, v.to(wide)).to(q.dtype).contiguous(), weights


@torch.library.register_fake("vitzoo::channel_attend")
def _forward_shapes(q, k, v, scale):
    B, _, N, D = q.shape
    weights = q.new_empty((B, N, D, k.shape[3]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty((B, v.shape[1], N, D)), weights


@torch.library.impl("vitzoo::channel_attend_backward", "cpu")
def _backward(dout, q, k, v, weights, scale):
    """With P the softmax: dP = dout^T v, dS = P (dP - sum(P dP)); dv = dout P, dq = k dS^T, dk = q dS."""
    wide = weights.dtype
    dout = dout.to(wide)
    dweights = torch.einsum("blni,blnj->bnij", dout, v.to(wide))
    dscore = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
    dq = torch.einsum("bsnj,bnij->bsni", k.to(wide), dscore)
    dk = torch.einsum("bsni,bnij->bsnj", q.to(wide), dscore)
    dv = torch.einsum("blni,bnij->blnj", dout, weights)
    return tuple(d.to(t.dtype).contiguous() for d, t in ((dq, q), (dk, k), (dv, v)))


@torch.library.register_fake("vitzoo::channel_attend_backward")
def _backward_shapes(dout, q, k, v, weights, scale):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, _):
    if dout is None:
        return None, None, None, None
    return *torch.ops.vitzoo.channel_attend_backward(dout, *ctx.saved_tensors, ctx.scale), None


torch.library.register_autograd("vitzoo::channel_attend", _autograd, setup_context=_setup_context)
