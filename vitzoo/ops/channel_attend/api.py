"""channel_attend: softmax attention in which channels see channels, over all tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops._validate import autocast, check_tensors
from vitzoo.ops.channel_attend import matmul, reference, triton


class ChannelAttendCall(NamedTuple):
    """A validated call: what implementations look at and run."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def channel_attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, impl: str | None = None) -> Tensor:
    """Attention of the channels of a head to each other: a softmax over D x D scores, whatever the number of tokens.

        out[l, i] = sum_j softmax_j(scale sum_s q[s, i] k[s, j]) v[l, j]

    XCiT's cross-covariance attention (El-Nouby et al. 2021, arXiv:2106.09681, section 3.2; its temperature and unit lengths
    are the caller's) and DaViT's channel attention (Ding et al. 2022, arXiv:2204.03645, section 3.3), whose published code
    gives its k, v, q as q, k, v here; Florence-2's second form gives its q, k, v and a scale of one over the square root of S.

    Args:
        q: `[B, S, N, D]` (batch, tokens, heads, channels of a head), any strides.
        k: `[B, S, N, E]`, likewise.
        v: `[B, L, N, E]`, of the same tokens or others.
        scale: factor of the scores. They are sums over S tokens, so a fixed one makes attention sharper on larger maps.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        `[B, L, N, D]` in the dtype of q, k, v (under autocast all three are cast to its dtype). Scores accumulate and their
        softmax is taken in at least fp32. Differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the named implementation does not support the call (the message
            holds its reason).
    """
    (out,) = OP.run(prepare(q, k, v, scale=scale), impl)
    return out


def prepare(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> ChannelAttendCall:
    """The validated call; raises ValueError with a sentence."""
    check_tensors("channel_attend", q=q, k=k, v=v, dims="[B, S, N, D]")
    if q.shape[:3] != k.shape[:3] or v.shape[0] != k.shape[0] or v.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"channel_attend needs q [B, S, N, D], k [B, S, N, E] and v [B, L, N, E], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
        )
    q, k, v = autocast(q, k, v)
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"channel_attend needs q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    return ChannelAttendCall(q, k, v, scale)


OP = Op(
    "channel_attend",
    prepare,
    (
        Implementation("torch", matmul.supports, matmul.run),
        # behind torch, which takes every call, for the reason that attend2d gives
        Implementation("triton", triton.supports, triton.run),
        Implementation("reference", reference.supports, reference.run),
    ),
)
