"""selective_scan: a state for each channel that every token fades and adds to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops._validate import check_tensors
from vitzoo.ops.selective_scan import chunked, reference, triton


class SelectiveScanCall(NamedTuple):
    """A validated call: what implementations look at and run."""

    u: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, *, impl: str | None = None) -> Tensor:
    """The states of a linear recurrence whose steps are chosen by the tokens, one number for each channel.

        h[l] = exp(delta[l] a) h[l - 1] + delta[l] b[l] u[l],  h[-1] = 0

    Gu and Dao 2023, arXiv:2312.00752, equation 2 with a state of one number, discretised as its algorithm 2 does; without the
    read-out, which is the caller's.

    Args:
        u: what is added, `[B, L, C]` (batch, tokens in their order, channels), any strides.
        delta: lengths of the steps, not negative, `[B, L, C]`.
        a: rates, not positive, `[C]`.
        b: how much of each token enters, for all channels alike, `[B, L]`.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        `[B, L, C]` in at least fp32: a state sums over the whole sequence, so it is never rounded to a half, and autocast
        changes nothing. Differentiable in all four. A zero length of step keeps the state as it is.

    Raises:
        ValueError: shapes or devices disagree, or the named implementation does not support the call (the message holds its
            reason).
    """
    (states,) = OP.run(prepare(u, delta, a, b), impl)
    return states


def prepare(u: Tensor, delta: Tensor, a: Tensor, b: Tensor) -> SelectiveScanCall:
    """The validated call; raises ValueError with a sentence."""
    check_tensors("selective_scan", u=u, delta=delta, dims="[B, L, C]")
    check_tensors("selective_scan", b=b, dims="[B, L]")
    check_tensors("selective_scan", a=a, dims="[C]")
    if delta.shape != u.shape or b.shape != u.shape[:2] or a.shape != u.shape[2:]:
        shapes = ", ".join(str(list(t.shape)) for t in (u, delta, a, b))
        raise ValueError(f"selective_scan needs u and delta [B, L, C], a [C] and b [B, L], got {shapes}.")
    if len({t.device for t in (u, delta, a, b)}) > 1:
        raise ValueError(
            f"selective_scan needs its tensors on one device, got {u.device}, {delta.device}, {a.device}, {b.device}."
        )
    return SelectiveScanCall(u, delta, a, b)


OP = Op(
    "selective_scan",
    prepare,
    (
        Implementation("torch", chunked.supports, chunked.run),
        # behind torch, which takes every call, for the reason that attend2d gives
        Implementation("triton", triton.supports, triton.run),
        Implementation("reference", reference.supports, reference.run),
    ),
)
