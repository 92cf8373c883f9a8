"""The launches of a forward and of a backward, from tensors to results; and with which tiles.

Tiles follow from shapes alone, so that a call gives the same bits on every card of a generation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._triton.host import common_unit, inside_int32, on_device, power, precision
from vitzoo.ops.sample2d.triton import gather

TOKENS, POINTS, CHANNELS = 64, 32, 64
"""The sides of the tiles of `sample_dmap`; the two other passes take POINTS points and at most twice CHANNELS channels."""


def forward(x: Tensor, points: Tensor) -> Tensor:
    """out `[B, S, G, C]`; arguments as those of `sample2d`, already validated and supported."""
    B, _, _, G, C = x.shape
    S = points.shape[1]
    out = torch.empty((B, S, G, C), dtype=x.dtype, device=x.device)
    if out.numel():
        tiles, channels = -(-S // POINTS), _channels(C, 2 * CHANNELS)
        with on_device(x):
            gather.sample_forward[(G * -(-C // channels) * tiles * B,)](
                x, points.float().contiguous(), out, **_shared(x, S, channels), tiles=tiles, BS=POINTS, num_warps=4
            )
    return out


def backward(grad_out: Tensor, x: Tensor, points: Tensor, wants: tuple[bool, bool] = (True, True)) -> tuple[Tensor, Tensor]:
    """dx like x and dpoints like points, contiguous; one that is not wanted is empty. The same bits every time."""
    B, H, W, G, C = x.shape
    S = points.shape[1]
    nothing = x.new_empty(0)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants[0] else nothing
    dpoints = torch.empty(points.shape, dtype=torch.float32, device=x.device) if wants[1] else nothing.clone()
    if not grad_out.numel():
        return dx.zero_(), dpoints.zero_().to(points.dtype)
    grad = grad_out if grad_out.stride(-1) == 1 and inside_int32(grad_out) else grad_out.contiguous()
    where = points.float().contiguous()
    with on_device(x):
        if wants[1]:
            tiles = -(-S // POINTS)
            gather.sample_dpoints[(G * tiles * B,)](
                x, where, grad, dpoints, **_shared(x, S, _channels(C, CHANNELS), grad), tiles=tiles, BS=POINTS, num_warps=4
            )
        if wants[0]:
            side, channels = max(16, min(TOKENS, power(H * W))), _channels(C, CHANNELS)
            tiles = -(-H * W // side)
            shared = _shared(x, S, channels, grad)
            for name in ("x_b", "x_y", "x_x", "x_g"):
                del shared[name]
            gather.sample_dmap[(G * -(-C // channels) * tiles * B,)](
                where, grad, dx, **shared, tiles=tiles, BT=side, BS=POINTS, PRECISION=precision(x.dtype), num_warps=4
            )
    return dx, dpoints.to(points.dtype) if wants[1] else dpoints


def _channels(C: int, most: int) -> int:
    return max(16, min(power(C), most))


def _shared(x: Tensor, S: int, channels: int, grad: Tensor | None = None) -> dict[str, Any]:
    """What all kernels are told of a call, by parameter name."""
    unit = common_unit(x) if grad is None else common_unit(x, grad)
    values: dict[str, Any] = {"height": x.shape[1], "width": x.shape[2], "samples": S, "groups": x.shape[3], "C": x.shape[4]}
    values |= {"BLOCK_C": channels, "UNIT": unit}
    values |= {f"x_{axis}": x.stride(dim) // unit for dim, axis in enumerate("byxg")}
    if grad is not None:
        values |= {f"g_{axis}": grad.stride(dim) // unit for dim, axis in enumerate("bsg")}
    return values
