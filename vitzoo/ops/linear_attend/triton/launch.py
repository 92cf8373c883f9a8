"""The launches of a forward and of a backward, from tensors to results. Sums over tokens have an order that shapes decide."""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton import products
from vitzoo.ops._triton.host import architecture, common_strides, common_unit, on_device, readable
from vitzoo.ops._triton.products import Tiles
from vitzoo.ops.linear_attend.triton import linear


def forward(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out `[B, L, N, E]`, norm `[B, L, N]`, matrix `[B, N, D, E]`, mean `[B, N, D]`; the last three are fp32."""
    B, L, N, D = q.shape
    S, E = v.shape[1], v.shape[3]
    out = q.new_empty((B, L, N, E), dtype=v.dtype)
    norm = q.new_empty((B, L, N), dtype=torch.float32)
    if S == 0 or B * N == 0:
        return out.zero_(), norm.fill_(1), *(q.new_zeros(shape, dtype=torch.float32) for shape in ((B, N, D, E), (B, N, D)))
    with on_device(q):
        matrix, mean = products.summed_products(k, v, 1 / S)
        unit = common_unit(q)

        def run(tiles: Tiles) -> None:
            count = -(-L // tiles.T)
            linear.linear_out[(N * -(-E // tiles.right) * count * B,)](
                q, matrix, mean, out, norm, eps, N, L, count, **common_strides(unit, "btn", q=q),
                D=D, E=E, BD=tiles.left, BE=tiles.right, BT=tiles.T, UNIT=unit, PRECISION=products.precision_of(q),
                num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip

        if L:
            run(products.choose("linear_out", L, D, E, q.dtype, architecture(q), run))
    return out, norm, matrix, mean  # type: ignore[return-value]


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, matrix: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, in the dtypes of q, k and v. The same call gives the same bits every time."""
    B, L, N, D = q.shape
    S, E = v.shape[1], v.shape[3]
    if q.numel() == 0 or S == 0:
        return tuple(torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))  # type: ignore[return-value]
    grad = readable(grad_out, out)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    weight, fade = torch.empty_like(norm), torch.empty_like(norm)
    with on_device(q):
        unit = common_unit(grad)

        def run(tiles: Tiles) -> None:
            count = -(-L // tiles.T)
            linear.linear_dq[(N * -(-D // tiles.left) * count * B,)](
                grad, out, norm, matrix, mean, dq, weight, fade, N, L, count, **common_strides(unit, "btn", g=grad),
                D=D, E=E, BD=tiles.left, BE=tiles.right, BT=tiles.T, UNIT=unit,
                PRECISION=products.precision_of(grad), num_warps=tiles.warps, num_stages=tiles.stages,
            )  # fmt: skip

        run(products.choose("linear_dq", L, D, E, grad.dtype, architecture(q), run))
        dmatrix, dmean = products.summed_products(q, grad, 1 / S, weight, fade)
        dk = products.multiplied(v, dmatrix, k.dtype, transposed=True, added=dmean)
        dv = products.multiplied(k, dmatrix, v.dtype)
    return dq, dk, dv
