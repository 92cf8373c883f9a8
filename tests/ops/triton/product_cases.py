"""Calls of linear_attend and channel_attend for the interpreter: one token, ragged tiles, parts, wide heads, mixed dtypes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    op: str
    L: int
    S: int
    D: int = 16
    E: int | None = None  # None: as D
    N: int = 2
    B: int = 2
    dtype: torch.dtype = torch.float32
    values: torch.dtype | None = None  # None: as dtype
    packed: bool = True
    eps: float = 1e-3
    settings: dict[str, int] = {}


CASES = {
    "linear: a ragged map, head dimension 24": Case("linear", 221, 221, D=24, N=3, B=1),
    "linear: one query, one key": Case("linear", 1, 1, N=3),
    "linear: few queries, keys in parts": Case("linear", 5, 70, settings={"LEAST_CHUNK": 16}),
    "linear: few keys, queries in parts": Case("linear", 70, 5, N=17, B=1, settings={"LEAST_CHUNK": 16}),
    "linear: values wider than features": Case("linear", 20, 33, D=8, E=40),
    "linear: long rows": Case("linear", 18, 20, D=130, E=72, N=1, B=1),
    "linear: half precision": Case("linear", 40, 50, D=32, dtype=torch.float16),
    "linear: features in fp32, values in halves": Case("linear", 30, 30, values=torch.float16),
    "linear: q, k, v and the gradient with strides of their own": Case("linear", 34, 34, packed=False),
    "linear: without an eps": Case("linear", 17, 35, eps=0.0, B=1),
    "channel: a ragged map, head dimension 24": Case("channel", 221, 221, D=24, N=3, B=1),
    "channel: one token": Case("channel", 1, 1, N=3),
    "channel: tokens in parts": Case("channel", 70, 80, settings={"LEAST_CHUNK": 16}),
    "channel: 17 heads": Case("channel", 20, 20, D=8, N=17, B=1),
    "channel: values of other tokens": Case("channel", 5, 37),
    "channel: more keys than queries among channels": Case("channel", 33, 20, D=16, E=40),
    "channel: fewer keys than queries among channels": Case("channel", 20, 33, D=72, E=8, N=1),
    "channel: long rows": Case("channel", 18, 20, D=130, N=1, B=1),
    "channel: half precision": Case("channel", 40, 50, D=32, dtype=torch.float16),
    "channel: q, k, v and the gradient with strides of their own": Case("channel", 34, 34, packed=False),
}


def linear(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """The weights of all pairs, over their sum and an eps for each."""
    weights = torch.einsum("blnd,bsnd->blns", q, k)
    return torch.einsum("blns,bsne->blne", weights / (weights + eps).sum(-1, keepdim=True), v)


def channel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A softmax over channels of k for each channel of q."""
    weights = torch.softmax(scale * torch.einsum("bsni,bsnj->bnij", q, k), -1)
    return torch.einsum("bnij,blnj->blni", weights, v)


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """q, k, v, the gradient of out, and eps or scale; out of one projection where shapes allow it."""
    E = case.D if case.E is None else case.E
    L, S, N, D, B = case.L, case.S, case.N, case.D, case.B
    if case.op == "linear":
        shapes, out, number = ((B, L, N, D), (B, S, N, D), (B, S, N, E)), (B, L, N, E), case.eps
    else:
        shapes, out, number = ((B, S, N, D), (B, S, N, E), (B, L, N, E)), (B, L, N, D), S**-0.5
    if case.packed and len(set(shapes)) == 1:
        q, k, v = torch.randn(B, L, 3, N, D, dtype=case.dtype, device=device).unbind(2)
    else:
        q, k, v = (torch.randn(shape, dtype=case.dtype, device=device) for shape in shapes)
    v = v.to(case.values or case.dtype)
    grad = torch.randn(out, dtype=v.dtype, device=device)
    if case.op == "linear":  # features are positive, and the gradient is such that those of the S keys are about 1
        small = 0.2 if case.dtype == torch.float16 else 1.0  # a half holds the sum of thousands of products of such features
        q.abs_().mul_(small)
        k.abs_().mul_(small)
        grad *= S
    if not case.packed:
        q, k = q[:, :1].expand(q.shape), k.transpose(1, 2).contiguous().transpose(1, 2)
        grad = grad.mT.contiguous().mT  # channels apart: must be copied
    return q, k, v, grad, number


def results(run, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, number: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """out and every gradient by name, everything in `dtype`."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in (("dq", q), ("dk", k), ("dv", v))}
    out = run(*leaves.values(), number)
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, leaves.values(), grad.to(dtype)), strict=True))}


def kernels(op: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, number: float) -> dict[str, Tensor]:
    """The same by our forward and backward."""
    if op == "linear":
        from vitzoo.ops.linear_attend import triton

        out, *saved = triton.forward(q, k, v, number)
        gradients = triton.backward(grad, q, k, v, out, *saved)
    else:
        from vitzoo.ops.channel_attend import triton as other

        out, weights = other.forward(q, k, v, number)
        gradients = other.backward(grad, q, k, v, weights, number)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))


def measure(case: Case) -> dict[str, float]:
    """The largest error of every result, relative to its largest value where that exceeds 1."""
    from vitzoo.ops._triton import products

    products.LEAST_CHUNK = case.settings.get("LEAST_CHUNK", 256)
    torch.manual_seed(0)
    arguments = inputs(case)
    actual = kernels(case.op, *arguments)
    exact = results(linear if case.op == "linear" else channel, *arguments, dtype=torch.float64)
    q, k, v = arguments[:3]
    for name, like in (("dq", q), ("dk", k), ("dv", v)):
        assert actual[name].dtype == like.dtype
        assert actual[name].is_contiguous()
    return {
        name: ((actual[name].double() - value).abs().max() / value.abs().max().clamp(min=1)).item()
        for name, value in exact.items()
    }
