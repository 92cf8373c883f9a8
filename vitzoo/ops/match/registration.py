"""The dispatcher's view of match: `torch.ops.vitzoo.match`, one opaque node in a captured graph.

The CPU kernel here is the definition; the gradient is that of the product of a token with its partner.
"""

from __future__ import annotations

import torch

from vitzoo.ops.match import reference

torch.library.define("vitzoo::match", "(Tensor a, Tensor b) -> (Tensor best, Tensor index)")


@torch.library.impl("vitzoo::match", "cpu")
def _forward(a, b):
    return reference.match(a, b)


@torch.library.register_fake("vitzoo::match")
def _shapes(a, b):
    return a.new_empty(a.shape[:2]), a.new_empty(a.shape[:2], dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx, dbest, _):
    return backward(dbest, *ctx.saved_tensors)


def backward(dbest, a, b, index):
    """da and db: each pair gives the other's token."""
    at = index[..., None].expand(-1, -1, a.shape[2])
    return dbest[..., None] * b.gather(1, at), torch.zeros_like(b).scatter_add(1, at, dbest[..., None] * a)


torch.library.register_autograd("vitzoo::match", _autograd, setup_context=_setup_context)
