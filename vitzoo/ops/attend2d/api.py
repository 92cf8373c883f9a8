"""attend2d: softmax attention on a map, along a pattern."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops._validate import autocast, check_tensors, default_scale
from vitzoo.ops.attend2d import reference, sdpa, triton
from vitzoo.patterns import Pattern


class Attend2dCall(NamedTuple):
    """A validated call: what implementations look at and run."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    bias: Tensor | None
    scale: float
    return_lse: bool


@overload
def attend2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...
@overload
def attend2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attend2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which query (y, x) sees the keys that `pattern` names.

        out[y, x] = sum over seen (v, u) of softmax(scale q[y, x] . k[v, u] + bias[v - y, u - x]) v[v, u]

    Args:
        q: queries `[B, H, W, N, D]` (batch, height, width, heads, head dim); any strides with D contiguous, so the three
            views of a packed projection `[B, H, W, 3, N, D]` need no copy. Under autocast q, k and v are cast to its dtype.
        k: keys, in the shape and the floating dtype of q.
        v: values, likewise.
        pattern: who sees whom (`vitzoo.patterns`).
        bias: relative position table `[N, 2 * reach_y + 1, 2 * reach_x + 1]` of any floating dtype. Its entry
            (reach_y + dy, reach_x + dx) is added where the key lies (dy, dx) positions from the query: key minus query,
            counted in steps of the pattern. The reach is `pattern.reach(H, W)`.
        scale: factor of q . k; D ** -0.5 unless given.
        return_lse: also return the log-sum-exp of every query's scores.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        out `[B, H, W, N, D]` in the dtype of q, k, v; with `return_lse` also lse `[B, H, W, N]`, natural logarithm, fp32
        (fp64 for fp64 inputs). Softmax and sums accumulate in at least fp32 in the reference. Differentiable once
        in q, k, v and bias, through out and through lse; twice in the reference.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the pattern has no meaning at this H x W; the named
            implementation does not support the call (the message holds its reason).

    Source: the span rule of `vitzoo.patterns`, of which Swin (arXiv:2103.14030), MaxViT (arXiv:2204.01697), HaloNet
    (arXiv:2103.12731), CSWin (arXiv:2107.00652) and NAT (arXiv:2204.07143) are cases.
    """
    call = prepare(q, k, v, pattern, bias=bias, scale=scale, return_lse=return_lse)
    out, lse = OP.run(call, impl)
    return (out, lse) if return_lse else out


def prepare(q, k, v, pattern, *, bias=None, scale=None, return_lse=False) -> Attend2dCall:
    """The validated call; raises ValueError with a sentence."""
    if not isinstance(pattern, Pattern):
        raise ValueError(f"attend2d needs a Pattern from vitzoo.patterns, got {pattern!r}.")
    check_tensors("attend2d", q=q, k=k, v=v, dims="[B, H, W, N, D]")
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"attend2d needs q, k, v of one shape, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}.")
    q, k, v = autocast(q, k, v)
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"attend2d needs q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    heads, (H, W) = q.shape[3], q.shape[1:3]
    pattern.check(H, W)
    if bias is not None:
        reach_y, reach_x = pattern.reach(H, W)
        expected = (heads, 2 * reach_y + 1, 2 * reach_x + 1)
        if bias.ndim != 3 or tuple(bias.shape) != expected:
            raise ValueError(
                f"{pattern!r} on a {H} x {W} map with {heads} heads needs a bias table {list(expected)}, "
                f"got {list(bias.shape)}."
            )
    return Attend2dCall(q, k, v, pattern, bias, default_scale(scale, q), return_lse)


OP = Op(
    "attend2d",
    prepare,
    (
        Implementation("sdpa", sdpa.supports, sdpa.run),
        # behind sdpa, which takes every call, so it runs where it is asked for by name: its kernels have been checked in
        # Triton's interpreter and by compiling them, and not yet on a GPU
        Implementation("triton", triton.supports, triton.run),
        Implementation("reference", reference.supports, reference.run),
    ),
)
