"""The dispatcher's view of linear_attend: `torch.ops.vitzoo.linear_attend`, one opaque node in a captured graph.

Fused implementations call it and register a kernel for their device; the CPU kernels here are the definition in plain
PyTorch, with the gradient written out. Beside out they give what the gradient needs: the norm that queries were divided by
`[B, L, N]`, the matrix k^T v / S `[B, N, D, E]` and the mean of k `[B, N, D]`, in at least fp32.
"""

from __future__ import annotations

import torch

torch.library.define(
    "vitzoo::linear_attend",
    "(Tensor q, Tensor k, Tensor v, float eps) -> (Tensor out, Tensor norm, Tensor matrix, Tensor mean)",
)
torch.library.define(
    "vitzoo::linear_attend_backward",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor norm, Tensor matrix, Tensor mean) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
)


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


@torch.library.impl("vitzoo::linear_attend", "cpu")
def _forward(q, k, v, eps):
    wide, keys = _wide(q, v), max(k.shape[1], 1)
    matrix = torch.einsum("bsnd,bsne->bnde", k.to(wide), v.to(wide)) / keys
    mean = k.to(wide).sum(1) / keys
    norm = torch.einsum("blnd,bnd->bln", q.to(wide), mean) + eps
    if k.shape[1] == 0:
        norm = torch.ones_like(norm)
    out = torch.einsum("blnd,bnde->blne", q.to(wide), matrix) / norm[..., None]
    return out.to(v.dtype).contiguous(), norm.contiguous(), matrix.contiguous(), mean.contiguous()


@torch.library.register_fake("vitzoo::linear_attend")
def _forward_shapes(q, k, v, eps):
    (B, L, N, D), E, wide = q.shape, v.shape[3], _wide(q, v)
    return (
        v.new_empty((B, L, N, E)),
        q.new_empty((B, L, N), dtype=wide),
        q.new_empty((B, N, D, E), dtype=wide),
        q.new_empty((B, N, D), dtype=wide),
    )


@torch.library.impl("vitzoo::linear_attend_backward", "cpu")
def _backward(dout, q, k, v, out, norm, matrix, mean):
    """With M the matrix and m the mean: dq = (dout M^T - (out . dout) m) / norm; dM and dm are sums over queries."""
    wide, keys = norm.dtype, max(k.shape[1], 1)
    upper = dout.to(wide) / norm[..., None]
    lower = -(upper * out.to(wide)).sum(-1)
    dq = torch.einsum("blne,bnde->blnd", upper, matrix) + lower[..., None] * mean[:, None]
    dmatrix = torch.einsum("blnd,blne->bnde", q.to(wide), upper) / keys
    dmean = torch.einsum("blnd,bln->bnd", q.to(wide), lower) / keys
    dk = torch.einsum("bsne,bnde->bsnd", v.to(wide), dmatrix) + dmean[:, None]
    dv = torch.einsum("bsnd,bnde->bsne", k.to(wide), dmatrix)
    return tuple(d.to(t.dtype).contiguous() for d, t in ((dq, q), (dk, k), (dv, v)))


@torch.library.register_fake("vitzoo::linear_attend_backward")
def _backward_shapes(dout, q, k, v, out, norm, matrix, mean):
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, *_):
    if dout is None:
        return None, None, None, None
    return *torch.ops.vitzoo.linear_attend_backward(dout, *ctx.saved_tensors), None


torch.library.register_autograd("vitzoo::linear_attend", _autograd, setup_context=_setup_context)
