"""The dispatcher's view of match: `torch.ops.vitzoo.match`, one opaque node in a captured graph.

The CPU kernel here is the definition.
"""

from __future__ import annotations

import torch

from vitzoo.ops.match import reference
from vitzoo.ops.match.gradient import backward

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


torch.library.register_autograd("vitzoo::match", _autograd, setup_context=_setup_context)
