"""The dispatcher's view of both ops, as matrices with one number in a column: each is the other's gradient.

    collect_tokens    y[k] = sum_{n: source[n] = k} weight[n] x[n]
    spread_tokens     x[n] = weight[n] y[source[n]]

A source of -1 goes nowhere and gets zeros. The CPU kernels here are the definition in plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("vitzoo::collect_tokens", "(Tensor x, Tensor source, Tensor weight, SymInt length) -> Tensor")
torch.library.define("vitzoo::spread_tokens", "(Tensor y, Tensor source, Tensor weight) -> Tensor")


def as_source(kept: Tensor, moved: Tensor, into: Tensor, share: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The map of merge_tokens as the source of each old token and its weight in fp32, ``[B, N]`` both."""
    B, K = kept.shape
    share = share.float()
    places = torch.arange(K, device=kept.device).expand(B, K)
    source = torch.full((B, length), -1, dtype=torch.int64, device=kept.device)
    source = source.scatter(1, kept, places).scatter(1, moved, into)
    own = share.new_ones(B, K).scatter_add(1, into, -share)
    return source, share.new_zeros(B, length).scatter(1, kept, own).scatter(1, moved, share)


def _matrix(source: Tensor, weight: Tensor, length: int) -> Tensor:
    """``[B, length, N]``."""
    return (source[:, None] == torch.arange(length, device=source.device)[None, :, None]) * weight[:, None]


@torch.library.impl("vitzoo::collect_tokens", "cpu")
def _collect(x, source, weight, length):
    return (_matrix(source, weight, length) @ x.to(weight.dtype)).to(x.dtype)


@torch.library.register_fake("vitzoo::collect_tokens")
def _collected_shape(x, source, weight, length):
    return x.new_empty((x.shape[0], length, x.shape[2]))


@torch.library.impl("vitzoo::spread_tokens", "cpu")
def _spread(y, source, weight):
    return (_matrix(source, weight, y.shape[1]).transpose(1, 2) @ y.to(weight.dtype)).to(y.dtype)


@torch.library.register_fake("vitzoo::spread_tokens")
def _spread_shape(y, source, weight):
    return y.new_empty((*source.shape, y.shape[2]))


def _remember_collect(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])


def _backward_of_collect(ctx, dy):
    return torch.ops.vitzoo.spread_tokens(dy, *ctx.saved_tensors), None, None, None


def _remember_spread(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])
    ctx.length = inputs[0].shape[1]


def _backward_of_spread(ctx, dx):
    return torch.ops.vitzoo.collect_tokens(dx, *ctx.saved_tensors, ctx.length), None, None


torch.library.register_autograd("vitzoo::collect_tokens", _backward_of_collect, setup_context=_remember_collect)
torch.library.register_autograd("vitzoo::spread_tokens", _backward_of_spread, setup_context=_remember_spread)
