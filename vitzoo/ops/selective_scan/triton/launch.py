"""The launches of a forward and of a backward, from tensors to results. Tiles follow from shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.host import on_device, power, readable
from vitzoo.ops.selective_scan.triton import kernels

TOKENS, CHANNELS = 64, 32
"""The sides of a tile: a scan takes a register for each number, twice, and few channels make many programs."""


def forward(u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """states `[B, L, C]`, fp32; arguments as those of `selective_scan`, already validated and supported."""
    B, L, C = u.shape
    states = torch.empty((B, L, C), dtype=torch.float32, device=u.device)
    if states.numel():
        tokens, channels, blocks = _tiles(L, C)
        with on_device(u):
            kernels.scan_forward[(blocks * B,)](
                u, delta, a.contiguous(), b.contiguous(), states, L, C, blocks,
                u.stride(0), u.stride(1), delta.stride(0), delta.stride(1), BLOCK_T=tokens, BLOCK_C=channels, num_warps=4,
            )  # fmt: skip
    return states


def backward(
    grad_states: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """du, ddelta, da, db in the dtypes of u, delta, a and b, contiguous. The same call gives the same bits every time."""
    B, L, C = u.shape
    du, ddelta = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (u, delta))
    if not u.numel():
        return du, ddelta, torch.zeros_like(a), torch.zeros_like(b)
    grad = readable(grad_states, states)
    tokens, channels, blocks = _tiles(L, C)
    da = torch.empty((B, C), dtype=torch.float32, device=u.device)
    db = torch.empty((blocks, B, L), dtype=torch.float32, device=u.device)
    with on_device(u):
        kernels.scan_backward[(blocks * B,)](
            grad, u, delta, a.contiguous(), b.contiguous(), states, du, ddelta, da, db, L, C, blocks, B,
            grad.stride(0), grad.stride(1), u.stride(0), u.stride(1), delta.stride(0), delta.stride(1),
            BLOCK_T=tokens, BLOCK_C=channels, num_warps=8,
        )  # fmt: skip
    return du, ddelta, da.sum(0).to(a.dtype), db.sum(0).to(b.dtype)


def _tiles(L: int, C: int) -> tuple[int, int, int]:
    """Tokens and channels of a tile, and how many blocks of channels there are."""
    tokens, channels = max(16, min(TOKENS, power(L))), max(16, min(CHANNELS, power(C)))
    return tokens, channels, -(-C // channels)
