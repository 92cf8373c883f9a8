"""The launches of both passes, from tensors to results. Sums have the order of the old tokens, whatever the card."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.host import inside_int32, on_device, power
from vitzoo.ops.merge_tokens.triton import passes

TOKENS, CHANNELS = 16, 256
"""The sides of a tile."""


def collect(x: Tensor, source: Tensor, weight: Tensor, length: int) -> Tensor:
    """y `[B, length, C]`, contiguous, in the dtype of x."""
    B, N, C = x.shape
    y = torch.empty((B, length, C), dtype=x.dtype, device=x.device)
    if y.numel():
        x = x if x.stride(-1) == 1 and inside_int32(x) else x.contiguous()
        ranked, order = source.sort(dim=1, stable=True)
        ends = torch.arange(length + 1, device=x.device).expand(B, -1).contiguous()
        first = torch.searchsorted(ranked, ends)
        with on_device(x):
            passes.collect[_grid(length, C, B)](
                x,
                order,
                first,
                weight.contiguous(),
                y,
                N=N,
                K=length,
                C=C,
                x_b=x.stride(0),
                x_t=x.stride(1),
                **_tiles(length, C),
            )
    return y


def spread(y: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """x `[B, N, C]`, contiguous, in the dtype of y."""
    B, _, C = y.shape
    N = source.shape[1]
    x = torch.empty((B, N, C), dtype=y.dtype, device=y.device)
    if x.numel():
        y = y if y.stride(-1) == 1 and inside_int32(y) else y.contiguous()
        with on_device(y):
            passes.spread[_grid(N, C, B)](
                y, source.contiguous(), weight.contiguous(), x, N=N, C=C, y_b=y.stride(0), y_t=y.stride(1), **_tiles(N, C)
            )
    return x


def _tiles(tokens: int, C: int) -> dict[str, int]:
    return {"tiles": -(-tokens // TOKENS), "BT": TOKENS, "BC": max(16, min(CHANNELS, power(C))), "num_warps": 4}


def _grid(tokens: int, C: int, B: int) -> tuple[int]:
    tiles = _tiles(tokens, C)
    return (tiles["tiles"] * -(-C // tiles["BC"]) * B,)
