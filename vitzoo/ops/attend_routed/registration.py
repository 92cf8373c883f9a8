"""The dispatcher's view of attend_routed: `torch.ops.vitzoo.attend_routed`, one opaque node in a captured graph.

Fused implementations call it and register a kernel for their device; the CPU kernels here are the definition in plain
PyTorch, with the gradient written out. graph: `[B, R, N or 1, K]` integers, the regions that each region of queries chose.
"""

from __future__ import annotations

import torch

from vitzoo.ops.attend_routed.reference import by_region, gather_chosen, to_map

torch.library.define(
    "vitzoo::attend_routed",
    "(Tensor q, Tensor k, Tensor v, Tensor graph, int[] regions, int[] key_regions, float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "vitzoo::attend_routed_backward",
    "(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor graph, Tensor out, Tensor lse, int[] regions, "
    "int[] key_regions, float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.impl("vitzoo::attend_routed", "cpu")
def _forward(q, k, v, graph, regions, key_regions, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    query = by_region(q.to(wide), regions)
    key, value = (gather_chosen(by_region(x.to(wide), key_regions), graph) for x in (k, v))
    scores = scale * query @ key.transpose(-2, -1)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    out = torch.exp(scores - lse) @ value
    return to_map(out, regions, q).to(q.dtype).contiguous(), to_map(lse, regions, q)[..., 0].contiguous()


@torch.library.register_fake("vitzoo::attend_routed")
def _forward_shapes(q, k, v, graph, regions, key_regions, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.impl("vitzoo::attend_routed_backward", "cpu")
def _backward(dout, dlse, q, k, v, graph, out, lse, regions, key_regions, scale):
    """With P the softmax: dS = P (dout v^T - sum(dout out) + dlse); keys get the sum over who has chosen them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dout = torch.zeros_like(out, dtype=wide) if dout is None else dout.to(wide)
    delta = (dout * out.to(wide)).sum(-1)
    delta = delta if dlse is None else delta - dlse.to(wide)
    query, grad, less, norm = (by_region(x, regions) for x in (q.to(wide), dout, delta[..., None], lse.to(wide)[..., None]))
    views = [by_region(x.to(wide), key_regions) for x in (k, v)]
    key, value = (gather_chosen(x, graph) for x in views)
    softmax = torch.exp(scale * query @ key.transpose(-2, -1) - norm)
    dscore = softmax * (grad @ value.transpose(-2, -1) - less) * scale
    dq = to_map(dscore @ key, regions, q).to(q.dtype).contiguous()
    sums = []
    batch, head = torch.arange(len(q))[:, None, None, None], torch.arange(q.shape[3])[:, None]
    for view, like, product in zip(views, (k, v), (dscore.mT @ query, softmax.mT @ grad), strict=True):
        total = torch.zeros_like(view)
        by_choice = product.unflatten(3, (graph.shape[-1], view.shape[3]))
        total.index_put_((batch, graph.expand(by_choice.shape[:4]), head), by_choice, accumulate=True)
        sums.append(to_map(total, key_regions, like).to(like.dtype).contiguous())
    return dq, *sums


@torch.library.register_fake("vitzoo::attend_routed_backward")
def _backward_shapes(dout, dlse, q, k, v, graph, out, lse, regions, key_regions, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output):
    *tensors, regions, key_regions, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = regions, key_regions, scale
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    gradients = torch.ops.vitzoo.attend_routed_backward(dout, dlse, *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None, None


torch.library.register_autograd("vitzoo::attend_routed", _autograd, setup_context=_setup_context)
