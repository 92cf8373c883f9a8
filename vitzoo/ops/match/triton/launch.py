"""The launch: from tensors to best partners."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.host import common_strides, common_unit, on_device, power, precision
from vitzoo.ops.match.triton import search

TOKENS, PARTNERS, CHANNELS = 32, 64, 64
"""The largest tile of products, and the channels of one step towards them."""


def forward(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """best `[B, A]` and index `[B, A]`; arguments as those of `match`, already validated and supported."""
    B, A, D = a.shape
    S = b.shape[1]
    best = torch.empty((B, A), dtype=a.dtype, device=a.device)
    index = torch.empty((B, A), dtype=torch.int64, device=a.device)
    if best.numel():
        rows, cols = max(16, min(TOKENS, power(A))), max(16, min(PARTNERS, power(S)))
        tiles, unit = -(-A // rows), common_unit(a, b)
        with on_device(a):
            search.best_partner[(tiles * B,)](
                a, b, best, index, **common_strides(unit, "bt", a=a, b=b), A=A, S=S, tiles=tiles, D=D, BA=rows, BS=cols,
                BLOCK_D=max(16, min(CHANNELS, power(D))), UNIT=unit, PRECISION=precision(a.dtype), num_warps=4,
            )  # fmt: skip
    return best, index
