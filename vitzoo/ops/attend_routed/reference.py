"""attend_routed as the definition says it: the keys of the chosen regions side by side, a softmax in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(call: object) -> str | None:
    """The reference takes every call."""
    return None


def run(call) -> tuple[Tensor]:
    """(out,) of an `AttendRoutedCall`."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q = by_region(call.q.to(wide), call.regions)
    k, v = (by_region(x.to(wide), call.key_regions) for x in (call.k, call.v))
    seen_k, seen_v = (gather_chosen(x, call.graph) for x in (k, v))
    out = torch.softmax(call.scale * q @ seen_k.transpose(-2, -1), -1) @ seen_v
    return (to_map(out, call.regions, call.q).to(call.q.dtype),)


def gather_chosen(x: Tensor, graph: Tensor) -> Tensor:
    """The tokens `[B, R, N, K * tokens, D]` that every region sees, from those of all regions, `[B, S, N, tokens, D]`."""
    batch, head = (torch.arange(n, device=x.device) for n in (x.shape[0], x.shape[2]))
    return x[batch[:, None, None, None], graph, head[:, None]].flatten(3, 4)


def by_region(x: Tensor, regions: tuple[int, int]) -> Tensor:
    """`[B, H, W, N, D]` to `[B, R, N, tokens, D]`."""
    x = x.unflatten(2, (regions[1], x.shape[2] // regions[1])).unflatten(1, (regions[0], x.shape[1] // regions[0]))
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)


def to_map(x: Tensor, regions: tuple[int, int], like: Tensor) -> Tensor:
    """Undoes `by_region`: `[B, R, N, tokens, E]` to a map of the size of `like` `[B, H, W, N, D]`."""
    B, H, W, N, _ = like.shape
    x = x.view(B, *regions, N, H // regions[0], W // regions[1], x.shape[-1])
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, N, x.shape[-1])
