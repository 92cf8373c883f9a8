"""The dispatcher's view of attend: `torch.ops.vitzoo.attend`, one opaque node in a captured graph.

`attend_at_points` is the same with a `PointBias`, whose tensors travel one by one.
Fused implementations call it and register a kernel for their device; the CPU kernels here are the definition in plain
PyTorch, with the gradient written out.
"""

from __future__ import annotations

import torch

from vitzoo.ops._softmax import probabilities
from vitzoo.ops.attend import reference
from vitzoo.ops.attend.point_bias import PointBias

torch.library.define(
    "vitzoo::attend",
    "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "vitzoo::attend_backward",
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, Tensor out, Tensor lse, "
    "float scale) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dkey_bias)",
)


def _forward(q, k, v, bias, key_bias, scale):
    out, lse = reference.attend(q, k, v, bias, key_bias, scale)
    return out.contiguous(), lse.contiguous()


torch.library.impl("vitzoo::attend", "cpu")(_forward)  # the decorator would leave None in its place


@torch.library.register_fake("vitzoo::attend")
def _forward_shapes(q, k, v, bias, key_bias, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


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


torch.library.impl("vitzoo::attend_backward", "cpu")(_backward)


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


# -- with a table read at points --------------------------------------------------------------------------------------

torch.library.define(
    "vitzoo::attend_at_points",
    "(Tensor q, Tensor k, Tensor v, Tensor table, Tensor points, Tensor rows, Tensor cols, Tensor? key_bias, float scale)"
    " -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "vitzoo::attend_at_points_backward",
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor table, Tensor points, Tensor rows, Tensor cols, "
    "Tensor? key_bias, Tensor out, Tensor lse, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dtable, Tensor dpoints, Tensor dkey_bias)",
)


@torch.library.impl("vitzoo::attend_at_points", "cpu")
def _forward_at_points(q, k, v, table, points, rows, cols, key_bias, scale):
    return _forward(q, k, v, PointBias(table, points, rows, cols).defined(), key_bias, scale)


@torch.library.register_fake("vitzoo::attend_at_points")
def _forward_at_points_shapes(q, k, v, table, points, rows, cols, key_bias, scale):
    return _forward_shapes(q, k, v, None, key_bias, scale)


@torch.library.impl("vitzoo::attend_at_points_backward", "cpu")
def _backward_at_points(dout, dlse, q, k, v, table, points, rows, cols, key_bias, out, lse, scale):
    bias = PointBias(table, points, rows, cols)
    dq, dk, dv, dbias, dkey_bias = _backward(dout, dlse, q, k, v, bias.defined(), key_bias, out, lse, scale)
    return dq, dk, dv, *(d.contiguous() for d in bias.gradients(dbias)), dkey_bias


@torch.library.register_fake("vitzoo::attend_at_points_backward")
def _backward_at_points_shapes(dout, dlse, q, k, v, table, points, rows, cols, key_bias, out, lse, scale):
    dq, dk, dv, _, dkey_bias = _backward_shapes(dout, dlse, q, k, v, None, key_bias, out, lse, scale)
    return dq, dk, dv, table.new_empty(table.shape), points.new_empty(points.shape), dkey_bias


def _setup_context_at_points(ctx, inputs, output):
    *tensors, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _autograd_at_points(ctx, dout, dlse):
    *gradients, dkey_bias = torch.ops.vitzoo.attend_at_points_backward(dout, dlse, *ctx.saved_tensors, ctx.scale)
    key_bias = ctx.saved_tensors[7]
    return *gradients, None, None, None if key_bias is None else dkey_bias, None


torch.library.register_autograd("vitzoo::attend_at_points", _autograd_at_points, setup_context=_setup_context_at_points)
