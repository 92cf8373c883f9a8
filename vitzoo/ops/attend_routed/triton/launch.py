"""The launches of a forward and of a backward, from tensors to results; with which tiles; and the index turned around.

Tiles follow from shapes, dtype and the GPU's generation, so that a call gives the same bits on every card of a generation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitzoo.ops._triton.host import (
    Tiles,
    architecture,
    common_strides,
    common_unit,
    flash_tiles,
    on_device,
    power,
    precision,
    readable,
)
from vitzoo.ops.attend_routed.triton import routed

Grid = tuple[int, int]


def forward(
    q: Tensor, k: Tensor, v: Tensor, graph: Tensor, regions: Grid, key_regions: Grid, scale: float
) -> tuple[Tensor, Tensor]:
    """out `[B, H, W, N, E]` and lse `[B, H, W, N]`; arguments as in an `AttendRoutedCall`, already validated and supported."""
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if out.numel():
        index = _index(graph)
        own, keys = _area(q, regions), _area(k, key_regions) * graph.shape[-1]
        tiles = flash_tiles("forward", own, keys, max(q.shape[-1], v.shape[-1]), q.dtype, architecture(q))
        count = -(-own // tiles.BQ)
        with on_device(q):
            routed.routed_forward[(q.shape[3] * count * regions[0] * regions[1] * len(q),)](
                q, k, v, index, out, lse, **_shared(scale, q, k, v, index, regions, key_regions, tiles), tiles=count
            )
    return out, lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Tensor,
    out: Tensor,
    lse: Tensor,
    regions: Grid,
    key_regions: Grid,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v, contiguous; the gradients of out and of lse may be None. The same bits every time."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if not out.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    grad = readable(grad_out, out)
    dlse = None if grad_lse is None else grad_lse.float().contiguous()
    delta = torch.empty_like(lse)
    index = _index(graph)
    chosen_by, offsets = turn_around(index, key_regions[0] * key_regions[1])
    own, key_own, channels = _area(q, regions), _area(k, key_regions), max(q.shape[-1], v.shape[-1])
    heads, arch = q.shape[3], architecture(q)
    with on_device(q):
        tiles = flash_tiles("dq", own, key_own * graph.shape[-1], channels, q.dtype, arch)
        count = -(-own // tiles.BQ)
        routed.routed_dq[(heads * count * regions[0] * regions[1] * len(q),)](
            q, k, v, index, out, lse, grad, dlse, delta, dq,
            **_shared(scale, q, k, v, index, regions, key_regions, tiles, grad), tiles=count,
        )  # fmt: skip
        tiles = flash_tiles("dkv", own * graph.shape[-1], key_own, channels, q.dtype, arch)
        count = -(-key_own // tiles.BK)
        routed.routed_dkv[(heads * count * key_regions[0] * key_regions[1] * len(q),)](
            q, k, v, chosen_by, offsets, lse, grad, delta, dk, dv,
            **_shared(scale, q, k, v, index, regions, key_regions, tiles, grad), tiles=count,
        )  # fmt: skip
    return dq, dk, dv


def turn_around(index: Tensor, key_regions: int) -> tuple[Tensor, Tensor]:
    """(regions `[B, N, R * K]`, offsets `[B, N, S + 1]`): who has chosen each region, from what each has, `[B, N, R, K]`."""
    chosen, order = index.flatten(2).sort(dim=-1, stable=True)
    bounds = torch.arange(key_regions + 1, dtype=index.dtype, device=index.device).expand(*index.shape[:2], -1).contiguous()
    return (order // index.shape[-1]).int(), torch.searchsorted(chosen, bounds, out_int32=True)


def _index(graph: Tensor) -> Tensor:
    """The graph `[B, R, N or 1, K]` as kernels read it."""
    return graph.transpose(1, 2).int().contiguous()


def _area(x: Tensor, regions: Grid) -> int:
    return x.shape[1] // regions[0] * (x.shape[2] // regions[1])


def _shared(
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    regions: Grid,
    key_regions: Grid,
    tiles: Tiles,
    grad: Tensor | None = None,
) -> dict[str, Any]:
    """What all kernels are told of a call, by parameter name."""
    tensors = {"q": q, "k": k, "v": v, **({} if grad is None else {"g": grad})}
    unit = common_unit(*tensors.values())
    values: dict[str, Any] = {"scale": scale, "heads": q.shape[3], "choices": index.shape[3], "index_heads": index.shape[1]}
    for prefix, x, (rows, cols) in (("", q, regions), ("key_", k, key_regions)):
        values |= {f"{prefix}regions": rows * cols, f"{prefix}region_cols": cols, f"{prefix}width": x.shape[2]}
        values |= {f"{prefix}rows": x.shape[1] // rows, f"{prefix}cols": x.shape[2] // cols}
    values |= {"D": q.shape[-1], "E": v.shape[-1], "UNIT": unit, "PRECISION": precision(q.dtype)}
    values |= {"BLOCK_D": max(16, power(q.shape[-1])), "BLOCK_E": max(16, power(v.shape[-1]))}
    values |= {"BQ": tiles.BQ, "BK": tiles.BK, "num_warps": tiles.warps, "num_stages": tiles.stages}
    return values | common_strides(unit, "byxn", **tensors)
