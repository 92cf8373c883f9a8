"""The dispatcher's view of attend: `torch.ops.vitzoo.attend`, one opaque node in a captured graph.

Fused implementations call it and register a kernel for their device; the CPU kernels here are the definition in plain
PyTorch, with the gradient written out.
"""

from __future__ import annotations

import torch

from vitzoo.ops._softmax import probabilities
from vitzoo.ops.attend import reference

torch.library.define(
    "vitzoo::attend",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "vitzoo::attend_backward",
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, Tensor out, Tensor lse, "
    "float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dkey_bias)",
)


@torch.library.impl("vitzoo::attend", "cpu")
def _forward(q, k, v, bias, key_bias, scale):
    out, lse = reference.attend(q, k, v, bias, key_bias, scale)
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("vitzoo::attend")
def _forward_shapes(q, k, v, bias, key_bias, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.impl("vitzoo::attend_backward", "cpu")
def _backward(dout, dlse, q, k, v, bias, key_bias, out, lse, scale):
    """With P the softmax: dS = P (dout v^T - sum(dout out) + dlse); a bias gets the sum of dS over what it was spread over."""
    scores = reference.biased_scores(q, k, bias, key_bias, scale)
    wide = scores.dtype
    dout = q.new_zeros(q.shape, dtype=wide) if dout is None else dout.to(wide)
    softmax = probabilities(scores, lse.transpose(1, 2))
    delta = (dout * out.to(wide)).sum(-1)
    delta = delta if dlse is None else delta - dlse.to(wide)
    dv = torch.einsum("bnls,blnd->bsnd", softmax, dout)
    dscore = softmax * (torch.einsum("blnd,bsnd->bnls", dout, v.to(wide)) - delta.transpose(1, 2)[..., None])
    dq = torch.einsum("bnls,bsnd->blnd", dscore, k.to(wide)) * scale
    dk = torch.einsum("bnls,blnd->bsnd", dscore, q.to(wide)) * scale
    nothing = q.new_empty(0)
    dbias = nothing if bias is None else dscore.sum_to_size(bias.shape).to(bias.dtype, copy=True).contiguous()
    dkey_bias = nothing.clone() if key_bias is None else dscore.sum((1, 2)).to(key_bias.dtype)
    return *(d.to(q.dtype).contiguous() for d in (dq, dk, dv)), dbias, dkey_bias


@torch.library.register_fake("vitzoo::attend_backward")
def _backward_shapes(dout, dlse, q, k, v, bias, key_bias, out, lse, scale):
    like = (q.new_empty(0) if b is None else b.new_empty(b.shape) for b in (bias, key_bias))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *like


def _setup_context(ctx, inputs, output):
    q, k, v, bias, key_bias, scale = inputs
    ctx.save_for_backward(q, k, v, bias, key_bias, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    _, _, _, bias, key_bias, *_ = ctx.saved_tensors
    gradients = torch.ops.vitzoo.attend_backward(dout, dlse, *ctx.saved_tensors, ctx.scale)
    dq, dk, dv, dbias, dkey_bias = gradients
    return dq, dk, dv, None if bias is None else dbias, None if key_bias is None else dkey_bias, None


torch.library.register_autograd("vitzoo::attend", _autograd, setup_context=_setup_context)
