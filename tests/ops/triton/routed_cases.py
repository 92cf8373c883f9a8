"""Calls of attend_routed for the interpreter: regions of a few tokens and of many, chosen by all, by nobody, twice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.triton.attend_cases import error


class Case(NamedTuple):
    size: tuple[int, int]
    regions: tuple[int, int]
    K: int
    keys: tuple[int, int] | None = None
    key_regions: tuple[int, int] | None = None
    D: int = 16
    E: int = 16
    N: int = 2
    B: int = 2
    per_head: bool = False
    same: bool = False  # all regions choose one of two, so that one is chosen twice and others by nobody
    packed: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "routed: regions of four tokens, packed": Case((6, 10), (3, 5), 4, D=24, E=24, N=3, packed=True),
    "routed: a choice for each of 17 heads": Case((4, 6), (2, 2), 2, N=17, B=1, D=8, E=8, per_head=True),
    "routed: keys on another map, wider values": Case((6, 4), (3, 2), 3, keys=(4, 9), key_regions=(2, 3), E=40),
    "routed: regions that nobody chose": Case((5, 14), (5, 2), 3, same=True),
    "routed: one token, one region": Case((1, 1), (1, 1), 1, N=3, B=1),
    "routed: all regions": Case((3, 3), (3, 3), 9, B=1),
    "routed: regions of more than a tile": Case((26, 17), (2, 1), 1, N=1, B=1),
    "routed: half precision": Case((8, 12), (4, 3), 5, D=32, E=32, dtype=torch.float16),
}  # fmt: skip


def inputs(case: Case, device: str = "cpu"):
    """q, k, v, graph `[B, R, N or 1, K]`, regions, key regions and the gradient of the output."""
    B, N = case.B, case.N
    keys, key_regions = case.keys or case.size, case.key_regions or case.regions
    q = torch.randn(B, *case.size, N, case.D, dtype=case.dtype, device=device)
    k, v = (torch.randn(B, *keys, N, d, dtype=case.dtype, device=device) for d in (case.D, case.E))
    if case.packed:
        q, k, v = torch.randn(B, *case.size, 3, N, case.D, dtype=case.dtype, device=device).unbind(3)
    R, S = case.regions[0] * case.regions[1], key_regions[0] * key_regions[1]
    shape = (B, R, N if case.per_head else 1)
    graph = torch.rand(*shape, S, device=device).argsort(-1)[..., : case.K]
    if case.same:
        graph = torch.tensor([1, 1, 0][: case.K], device=device).expand(*shape, case.K).clone()
        graph[:, 0] = 2
    dout = torch.randn(B, *case.size, N, case.E, dtype=case.dtype, device=device)
    return q, k, v, graph, list(case.regions), list(key_regions), dout


def by_region(x: Tensor, regions) -> Tensor:
    """`[B, H, W, N, D]` to `[B, N, R, tokens, D]`."""
    B, H, W, N, D = x.shape
    x = x.reshape(B, regions[0], H // regions[0], regions[1], W // regions[1], N, D)
    return x.permute(0, 5, 1, 3, 2, 4, 6).reshape(B, N, regions[0] * regions[1], -1, D)


def oracle(q: Tensor, k: Tensor, v: Tensor, graph: Tensor, regions, key_regions, scale: float) -> tuple[Tensor, Tensor]:
    """Every region as attention to the tokens of the regions that it chose, one after another; lse too."""
    B, H, W, N, _ = q.shape
    queries, keys, values = by_region(q, regions), by_region(k, key_regions), by_region(v, key_regions)
    outs, lses = [], []
    for b in range(B):
        for n in range(N):
            for r in range(queries.shape[2]):
                chosen = graph[b, r, n % graph.shape[2]].tolist()
                seen_k, seen_v = (torch.cat([x[b, n, s] for s in chosen]) for x in (keys, values))
                scores = scale * queries[b, n, r] @ seen_k.T
                lses.append(torch.logsumexp(scores, -1))
                outs.append(torch.softmax(scores, -1) @ seen_v)
    back = (B, N, *regions, H // regions[0], W // regions[1])
    out = torch.stack(outs).view(*back, v.shape[-1]).permute(0, 2, 4, 3, 5, 1, 6).reshape(B, H, W, N, -1)
    return out, torch.stack(lses).view(back).permute(0, 2, 4, 3, 5, 1).reshape(B, H, W, N)


def gradients(given, dtype: torch.dtype) -> dict[str, Tensor]:
    q, k, v, graph, regions, key_regions, dout = given
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    out, lse = oracle(*leaves, graph, regions, key_regions, 0.3)
    found = torch.autograd.grad((out * dout.to(dtype)).sum() + lse.sum(), leaves)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *found), strict=True))


def kernels(given) -> dict[str, Tensor]:
    from vitzoo.ops.attend_routed import triton

    *call, dout = given
    out, lse = triton.forward(*call, 0.3)
    grads = triton.backward(dout, torch.ones_like(lse), *call[:4], out, lse, *call[4:], 0.3)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))


def measure(case: Case) -> dict[str, float]:
    """The largest error of every result, relative to its largest value where that exceeds 1."""
    torch.manual_seed(0)
    given = inputs(case)
    exact = gradients(given, torch.float64)
    return {name: error(value.double(), exact[name]) for name, value in kernels(given).items()}
