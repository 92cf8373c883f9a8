"""The dispatcher's view of selective_scan: `torch.ops.vitzoo.selective_scan`, one opaque node in a captured graph.

Fused implementations call it and register a kernel for their device; the CPU kernels here are the definition in plain
PyTorch, with the gradient written out.
"""

from __future__ import annotations

import torch

from vitzoo.ops.selective_scan import reference
from vitzoo.ops.selective_scan.reference import wide

torch.library.define("vitzoo::selective_scan", "(Tensor u, Tensor delta, Tensor a, Tensor b) -> Tensor states")
torch.library.define(
    "vitzoo::selective_scan_backward",
    "(Tensor dstates, Tensor u, Tensor delta, Tensor a, Tensor b, Tensor states) "
    "-> (Tensor du, Tensor ddelta, Tensor da, Tensor db)",
)


@torch.library.impl("vitzoo::selective_scan", "cpu")
def _forward(u, delta, a, b):
    return reference.run((u, delta, a, b))[0].contiguous()


@torch.library.register_fake("vitzoo::selective_scan")
def _forward_shapes(u, delta, a, b):
    return u.new_empty(u.shape, dtype=wide(u, delta, a, b))


@torch.library.impl("vitzoo::selective_scan_backward", "cpu")
def _backward(dstates, u, delta, a, b, states):
    """From the last token to the first: what a state is worth is its own gradient and, faded, that of the next one."""
    given, dtype = (u, delta, a, b), states.dtype
    u, delta, a, b = (t.to(dtype) for t in given)
    fade = torch.exp(delta * a)
    worth = torch.zeros_like(states)
    for t in reversed(range(u.shape[1])):
        worth[:, t] = dstates[:, t] if t + 1 == u.shape[1] else dstates[:, t] + fade[:, t + 1] * worth[:, t + 1]
    before = torch.nn.functional.pad(states[:, :-1], (0, 0, 1, 0)) if u.shape[1] else states
    dlog = worth * before * fade
    dstep = worth * b[..., None]
    results = (dstep * delta, dlog * a + dstep * u, (dlog * delta).sum((0, 1)), (worth * delta * u).sum(-1))
    return tuple(d.to(t.dtype, copy=True).contiguous() for d, t in zip(results, given, strict=True))


@torch.library.register_fake("vitzoo::selective_scan_backward")
def _backward_shapes(dstates, u, delta, a, b, states):
    return tuple(t.new_empty(t.shape) for t in (u, delta, a, b))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _autograd(ctx, dstates):
    return torch.ops.vitzoo.selective_scan_backward(dstates, *ctx.saved_tensors)


torch.library.register_autograd("vitzoo::selective_scan", _autograd, setup_context=_setup_context)
