"""linear_attend: attention whose weights are products of features, so that keys are summed before queries come."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops._validate import check_tensors
from vitzoo.ops.linear_attend import matmul, reference, triton


class LinearAttendCall(NamedTuple):
    """A validated call: what implementations look at and run."""

    q: Tensor
    k: Tensor
    v: Tensor
    eps: float


def linear_attend(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6, impl: str | None = None) -> Tensor:
    """Attention whose weights are plain products, at a cost linear in queries and keys; the feature map is the caller's.

        out[l] = sum_s (q[l] . k[s]) v[s] / sum_s (q[l] . k[s] + eps)
               = q[l] (k^T v) / (q[l] . sum_s k[s] + S eps)

    Katharopoulos et al. 2020, arXiv:2006.16236, equation 5. With features that are not negative the weights of a query are
    a mean over the keys, and eps says from where on it fades: a query that is orthogonal to all keys gets zeros.

    Args:
        q: features of the queries, `[B, L, N, D]` (batch, queries, heads, features); any strides.
        k: features of the keys, `[B, S, N, D]` (S keys) in the dtype of q.
        v: values, `[B, S, N, E]` of any floating dtype; E may differ from D.
        eps: at least 0. It is measured against the mean of q . k, so it means the same on maps of every size.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        `[B, L, N, E]` in the dtype of v; zeros where there is no key. Products and sums accumulate in at least fp32, and
        autocast changes nothing: features span more orders of magnitude than a half holds. Differentiable in q, k and v.

    Raises:
        ValueError: shapes, dtypes or devices disagree, eps is negative, or the named implementation does not support the
            call (the message holds its reason).
    """
    (out,) = OP.run(prepare(q, k, v, eps=eps), impl)
    return out


def prepare(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6) -> LinearAttendCall:
    """The validated call; raises ValueError with a sentence."""
    check_tensors("linear_attend", q=q, k=k, v=v, dims="[B, L, N, D]")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        raise ValueError(
            f"linear_attend needs q [B, L, N, D], k [B, S, N, D] and v [B, S, N, E], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
        )
    if q.dtype != k.dtype:
        raise ValueError(f"linear_attend needs q and k of one dtype, got {q.dtype} and {k.dtype}.")
    if eps < 0:
        raise ValueError(f"linear_attend needs an eps of at least 0, got {eps}.")
    return LinearAttendCall(q, k, v, float(eps))


OP = Op(
    "linear_attend",
    prepare,
    (
        Implementation("torch", matmul.supports, matmul.run),
        # behind torch, which takes every call, for the reason that attend2d gives
        Implementation("triton", triton.supports, triton.run),
        Implementation("reference", reference.supports, reference.run),
    ),
)
