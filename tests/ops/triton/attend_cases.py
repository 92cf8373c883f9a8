"""Calls of attend for the interpreter: few queries and many keys, the reverse, biases of every spread, keys that are masked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    L: int
    S: int
    D: int = 16
    N: int = 2
    B: int = 2
    bias: tuple[int, ...] | None = None
    key_bias: bool = False
    masked: bool = False  # a key is masked for all queries, and in the first image every key
    dlse: bool = True
    dtype: torch.dtype = torch.float32
    settings: dict[str, int] = {}


CASES = {
    "attend: agents to keys, in parts": Case(9, 70, N=3, settings={"LEAST_CHUNK": 16}),
    "attend: queries to agents, a bias for all images": Case(70, 9, N=3, bias=(3, 70, 9), settings={"LEAST_CHUNK": 16}),
    "attend: sizes of merged tokens": Case(21, 21, D=24, key_bias=True),
    "attend: masked keys": Case(18, 33, key_bias=True, masked=True),
    "attend: a bias for each image": Case(35, 17, D=40, bias=(2, 2, 35, 17), key_bias=True, dlse=False),
    "attend: a bias for all heads": Case(17, 35, bias=(2, 1, 17, 35)),
    "attend: one query, one key": Case(1, 1, N=3, B=1, bias=(1, 1)),
    "attend: half precision": Case(40, 50, D=32, dtype=torch.float16, bias=(2, 40, 50)),
    "attend: long rows": Case(20, 19, D=130, N=1, B=1, key_bias=True),
    "attend: more than a tile of both": Case(130, 140, N=1, B=1, dlse=False),
}  # fmt: skip


def oracle(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The definition in fp64, a query without keys giving zeros."""
    scores = torch.einsum("blnd,bsnd->bnls", q, k) * scale
    if bias is not None:
        scores = scores + bias
    if key_bias is not None:
        scores = scores + key_bias[:, None, None]
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse)[..., None])
    return torch.einsum("bnls,bsnd->blnd", p, v), lse.transpose(1, 2)


def measure(case: Case) -> dict[str, float]:
    """The largest error of every result, relative to its largest value where that exceeds 1."""
    from vitzoo.ops.attend import triton
    from vitzoo.ops.attend.triton import launch

    launch.LEAST_CHUNK = case.settings.get("LEAST_CHUNK", 256)
    torch.manual_seed(0)
    scale = 0.3
    q = torch.randn(case.B, case.L, case.N, case.D, dtype=case.dtype)
    k, v = torch.randn(case.B, case.S, 2, case.N, case.D, dtype=case.dtype).unbind(2)
    bias = None if case.bias is None else torch.randn(case.bias)
    key_bias = torch.randn(case.B, case.S) if case.key_bias else None
    if case.masked and key_bias is not None:
        key_bias[:, 3], key_bias[0] = -torch.inf, -torch.inf
    dout = torch.randn_like(q)
    dlse = torch.randn(q.shape[:3]) if case.dlse and not case.masked else None
    out, lse = triton.forward(q, k, v, bias, key_bias, scale)
    grads = triton.backward(dout, dlse, q, k, v, bias, key_bias, out, lse, scale)
    actual = dict(zip(("out", "lse", "dq", "dk", "dv", "dbias", "dkey_bias"), (out, lse, *grads), strict=True))

    given = {"dq": q, "dk": k, "dv": v, "dbias": bias, "dkey_bias": key_bias}
    leaves = {name: t.detach().double().requires_grad_() for name, t in given.items() if t is not None}
    exact_out, exact_lse = oracle(leaves["dq"], leaves["dk"], leaves["dv"], leaves.get("dbias"), leaves.get("dkey_bias"), scale)
    loss = (exact_out * dout).sum() + (0.0 if dlse is None else (exact_lse * dlse).sum())
    exact = {"out": exact_out, "lse": exact_lse, **dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))}
    return {name: error(actual[name].double(), value.detach()) for name, value in exact.items()}


def error(actual: Tensor, exact: Tensor) -> float:
    """Infinities must be the same ones; NaN, which an all-masked row's gradient is in plain autograd, is compared with zero."""
    exact = torch.nan_to_num(exact, nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if not torch.equal(torch.isinf(actual), torch.isinf(exact)) or bool(torch.isnan(actual).any()):
        return float("inf")
    actual, exact = (torch.where(torch.isinf(t), 0.0, t) for t in (actual, exact))
    return float((actual - exact).abs().max() / exact.abs().max().clamp(min=1))
