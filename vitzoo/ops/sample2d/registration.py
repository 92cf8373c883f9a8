"""The dispatcher's view of sample2d: `torch.ops.vitzoo.sample2d`, one opaque node in a captured graph.

Fused implementations call it and register a kernel for their device; the CPU kernels here are the definition in plain
PyTorch, with the gradient written out.
"""

from __future__ import annotations

import torch

from vitzoo.ops._bilinear import nearness, slope
from vitzoo.ops.sample2d import reference

torch.library.define("vitzoo::sample2d", "(Tensor x, Tensor points) -> Tensor")
torch.library.define("vitzoo::sample2d_backward", "(Tensor dout, Tensor x, Tensor points) -> (Tensor dx, Tensor dpoints)")


@torch.library.impl("vitzoo::sample2d", "cpu")
def _forward(x, points):
    return reference.sample(x, points).contiguous()


@torch.library.register_fake("vitzoo::sample2d")
def _forward_shapes(x, points):
    return x.new_empty((*points.shape[:3], x.shape[4]))


@torch.library.impl("vitzoo::sample2d_backward", "cpu")
def _backward(dout, x, points):
    wide = torch.promote_types(x.dtype, torch.float32)
    positions = [(points[..., axis].to(wide), x.shape[1 + axis]) for axis in (0, 1)]
    weights, slopes = ([of(p, n) for p, n in positions] for of in (nearness, slope))
    wide_x, wide_dout = x.to(wide), dout.to(wide)
    dx = torch.einsum("bsgi,bsgj,bsgc->bijgc", *weights, wide_dout)
    both = ((slopes[0], weights[1]), (weights[0], slopes[1]))
    dpoints = [torch.einsum("bsgi,bsgj,bijgc,bsgc->bsg", rows, cols, wide_x, wide_dout) for rows, cols in both]
    return dx.to(x.dtype).contiguous(), torch.stack(dpoints, -1).to(points.dtype)


@torch.library.register_fake("vitzoo::sample2d_backward")
def _backward_shapes(dout, x, points):
    return x.new_empty(x.shape), points.new_empty(points.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dout):
    return torch.ops.vitzoo.sample2d_backward(dout, *ctx.saved_tensors)


torch.library.register_autograd("vitzoo::sample2d", _autograd, setup_context=_setup_context)
