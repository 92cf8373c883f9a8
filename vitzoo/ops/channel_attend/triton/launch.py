"""The launches of a forward and of a backward, from tensors to results. Sums over tokens have an order that shapes decide."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton import products
from vitzoo.ops._triton.host import on_device, power, readable
from vitzoo.ops.channel_attend.triton import channel

NUMBERS = 2048
"""Of a matrix in one program."""


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out `[B, L, N, D]` in the dtype of q, and the weights `[B, N, D, E]` in fp32."""
    B, S, N, D = q.shape
    E = k.shape[3]
    weights = q.new_empty((B, N, D, E), dtype=torch.float32)
    if B * N == 0:
        return q.new_empty((B, v.shape[1], N, D)), weights
    with on_device(q):
        parts = products.products_in_parts(q, k)[0] if S else torch.zeros_like(weights)[None]
        _between_channels(channel.channel_softmax, q, parts, weights, scale)
        return products.multiplied(v, weights, q.dtype, transposed=True), weights


def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the dtypes of q, k and v. The same call gives the same bits every time."""
    if grad_out.numel() == 0:
        return tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))  # type: ignore[return-value]
    grad = readable(grad_out, grad_out)
    with on_device(q):
        parts, _ = products.products_in_parts(grad, v)
        dscore = torch.empty_like(weights)
        _between_channels(channel.channel_dscore, q, parts, weights, dscore, scale)
        dq = products.multiplied(k, dscore, q.dtype, transposed=True)
        dk = products.multiplied(q, dscore, k.dtype)
        dv = products.multiplied(grad, weights, v.dtype)
    return dq, dk, dv


def _between_channels(kernel, q: Tensor, parts: Tensor, *arguments: Tensor | float) -> None:
    _, B, N, D, E = parts.shape
    block_e = max(16, power(E))
    rows = max(1, min(power(D), NUMBERS // block_e))
    kernel[(-(-D // rows) * N * B,)](
        parts, *arguments, len(parts), parts[0].numel(), D=D, E=E, BD=rows, BLOCK_E=block_e,
        ROUND=int(products.precision_of(q) == "tf32"), num_warps=4,
    )  # fmt: skip
