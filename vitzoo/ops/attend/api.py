"""attend: softmax attention of one token sequence to another."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops._validate import autocast, check_tensors, default_scale
from vitzoo.ops.attend import reference, sdpa, triton
from vitzoo.ops.attend.point_bias import PointBias


class AttendCall(NamedTuple):
    """A validated call: what implementations look at and run."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | PointBias | None
    key_bias: Tensor | None
    scale: float
    return_lse: bool


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | PointBias | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | PointBias | None = ...,
    key_bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | PointBias | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which every query sees every key: pooled keys, agents, sampled keys, merged tokens.

        out[l] = sum_s softmax_s(scale q[l] . k[s] + bias[l, s] + key_bias[s]) v[s]

    Args:
        q: `[B, L, N, D]` (batch, queries, heads, head dim); any strides with D contiguous.
        k: `[B, S, N, D]` (S keys) in the dtype of q. Under autocast all three are cast to its dtype.
        v: values, likewise.
        bias: anything that broadcasts to `[B, N, L, S]`, of any floating dtype; or a `PointBias`, a table that is read at the
            points from which keys were sampled (no implementation in Triton holds it for all pairs).
        key_bias: `[B, S]`, added for all heads and queries: the logarithm of a merged token's size, or -inf to
            mask a key.
        scale: factor of q . k; D ** -0.5 unless given.
        return_lse: also return the log-sum-exp of every query's scores.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        out `[B, L, N, D]` in the dtype of q, k, v; with `return_lse` also lse `[B, L, N]`, natural logarithm, fp32 (fp64 for
        fp64 inputs). A query without a key (S = 0, or all masked) gets zeros and a lse of -inf. Softmax and sums
        accumulate in at least fp32 in the reference. Differentiable in q, k, v, bias (a table and
        its points, too) and key_bias, through out and lse.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the named implementation does not support the call (the message
            holds its reason).
    """
    call = prepare(q, k, v, bias=bias, key_bias=key_bias, scale=scale, return_lse=return_lse)
    out, lse = OP.run(call, impl)
    return (out, lse) if return_lse else out


def prepare(q, k, v, *, bias=None, key_bias=None, scale=None, return_lse=False) -> AttendCall:
    """The validated call; raises ValueError with a sentence."""
    check_tensors("attend", q=q, k=k, v=v, dims="[B, L, N, D]")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            f"attend needs q [B, L, N, D] and k, v [B, S, N, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
        )
    q, k, v = autocast(q, k, v)
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"attend needs q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    B, L, N, _ = q.shape
    S = k.shape[1]
    if isinstance(bias, PointBias):
        bias.check(B, N, L, S, q.device)
    elif bias is not None:
        padded = (1,) * (4 - bias.ndim) + tuple(bias.shape)
        if bias.ndim > 4 or any(have != 1 and have != want for have, want in zip(padded, (B, N, L, S), strict=True)):
            raise ValueError(f"attend needs a bias that broadcasts to [{B}, {N}, {L}, {S}], got {list(bias.shape)}.")
    if key_bias is not None and tuple(key_bias.shape) != (B, S):
        raise ValueError(f"attend needs a key_bias [{B}, {S}], got {list(key_bias.shape)}.")
    return AttendCall(q, k, v, bias, key_bias, default_scale(scale, q), return_lse)


OP = Op(
    "attend",
    prepare,
    (
        Implementation("sdpa", sdpa.supports, sdpa.run),
        # behind sdpa, which takes every call, for the reason that attend2d gives
        Implementation("triton", triton.supports, triton.run),
        Implementation("reference", reference.supports, reference.run),
    ),
)


def computes_lse(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None, scale: float | None = None) -> bool:
    """Whether the implementation that would run this call computes the log-sum-exp anyway, so that asking for it is free."""
    return OP.choose(prepare(q, k, v, key_bias=key_bias, scale=scale), None).name != "sdpa"
