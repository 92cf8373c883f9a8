"""attend in Triton: tiles of queries over tiles of keys, split where one side is short.

Loaded, registered and interpreted as those of attend2d are: see `vitzoo.ops.attend2d.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitzoo.ops._triton.limits import DTYPES, why_not
from vitzoo.ops.attend.point_bias import PointBias


def supports(call) -> str | None:
    """None, or why these kernels cannot run an `AttendCall`."""
    reason = why_not(q=call.q, k=call.k, v=call.v)
    if reason is not None:
        return reason
    B, L, N, _ = call.q.shape
    S = call.k.shape[1]
    at_points = isinstance(call.bias, PointBias)
    biases = call.bias._asdict() if at_points else {"bias": call.bias}
    for name, bias in (*biases.items(), ("key_bias", call.key_bias)):
        if bias is not None and bias.dtype not in DTYPES:
            return f"it takes a {name} of float16, bfloat16 or float32, got {bias.dtype}."
    if at_points:
        if call.bias.rows.requires_grad or call.bias.cols.requires_grad:
            return "the rows and cols of its PointBias are constants, and one of them requires a gradient."
        if call.bias.table.numel() >= 2**31:
            return "its table holds 2^31 entries or more."
    elif call.bias is not None:
        rows, cols = (1, 1, *call.bias.shape)[-2:]
        if (rows, cols) != (L, S):
            return f"its bias has an entry for each of {L} x {S} pairs, got {rows} x {cols}; key_bias is for one per key."
    if L * S >= 2**31 or B * N * max(L, S) >= 2**31:
        return "it counts scores of one head, and tokens of all images, in 32 bits: there are 2^31 or more."
    return None


def run(call) -> tuple[Tensor, Tensor]:
    """(out `[B, L, N, D]`, lse `[B, L, N]`) of a supported `AttendCall`."""
    if isinstance(call.bias, PointBias):
        arguments = call.q, call.k, call.v, *call.bias, call.key_bias, call.scale
        run_op, interpreted = torch.ops.vitzoo.attend_at_points, _InterpretedAtPoints
    else:
        arguments = call.q, call.k, call.v, call.bias, call.key_bias, call.scale
        run_op, interpreted = torch.ops.vitzoo.attend, _Interpreted
    return run_op(*arguments) if call.q.device.type == "cuda" else interpreted.apply(*arguments)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The op's forward: out in the dtype of q, lse in fp32, both contiguous."""
    from vitzoo.ops.attend.triton import launch

    return launch.forward(q, k, v, bias, key_bias, scale)


def backward(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_bias: Tensor | None,
    out: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The op's backward: dq, dk, dv, and the biases' gradients (empty where there is no bias)."""
    from vitzoo.ops.attend.triton import launch

    dq, dk, dv, dbias, dkey = launch.backward(dout, dlse, q, k, v, bias, key_bias, out, lse, scale)
    nothing = q.new_empty(0)
    return dq, dk, dv, nothing if dbias is None else dbias, nothing.clone() if dkey is None else dkey


def forward_at_points(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, points: Tensor, rows: Tensor, cols: Tensor, key_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`forward` with the bias of a table that is read at points."""
    from vitzoo.ops.attend.triton import launch

    return launch.forward(q, k, v, PointBias(table, points, rows, cols), key_bias, scale)


def backward_at_points(
    dout: Tensor | None, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, table: Tensor, points: Tensor, rows: Tensor,
    cols: Tensor, key_bias: Tensor | None, out: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dtable, dpoints, and the gradient of key_bias (empty where there is none)."""
    from vitzoo.ops.attend.triton import launch

    bias = PointBias(table, points, rows, cols)
    dq, dk, dv, (dtable, dpoints), dkey = launch.backward(dout, dlse, q, k, v, bias, key_bias, out, lse, scale)
    return dq, dk, dv, dtable, dpoints, q.new_empty(0) if dkey is None else dkey


torch.library.impl("vitzoo::attend_at_points", "cuda")(forward_at_points)
torch.library.impl("vitzoo::attend_at_points_backward", "cuda")(backward_at_points)
torch.library.impl("vitzoo::attend", "cuda")(forward)
torch.library.impl("vitzoo::attend_backward", "cuda")(backward)


class _Interpreted(torch.autograd.Function):
    """The same two functions for CPU tensors, where the op itself computes the definition."""

    @staticmethod
    def forward(ctx, q, k, v, bias, key_bias, scale):
        out, lse = forward(q, k, v, bias, key_bias, scale)
        ctx.save_for_backward(q, k, v, bias, key_bias, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        _, _, _, bias, key_bias, *_ = ctx.saved_tensors
        dq, dk, dv, dbias, dkey = backward(dout, dlse, *ctx.saved_tensors, ctx.scale)
        return dq, dk, dv, None if bias is None else dbias, None if key_bias is None else dkey, None


class _InterpretedAtPoints(torch.autograd.Function):
    """The same with a table that is read at points."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.scale = arguments
        out, lse = forward_at_points(*arguments)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        *gradients, dkey = backward_at_points(dout, dlse, *ctx.saved_tensors, ctx.scale)
        return *gradients, None, None, None if ctx.saved_tensors[7] is None else dkey, None
