"""attend_routed: every region of queries sees the keys of the regions that were chosen for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops._validate import autocast, check_tensors, default_scale
from vitzoo.ops.attend_routed import reference, sdpa, triton


class AttendRoutedCall(NamedTuple):
    """A validated call: what implementations look at and run."""

    q: Tensor
    k: Tensor
    v: Tensor
    regions: tuple[int, int]
    key_regions: tuple[int, int]
    graph: Tensor  # the index as [B, R, N or 1, K]
    scale: float


def attend_routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: tuple[int, int],
    index: Tensor,
    *,
    key_regions: tuple[int, int] | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention between the regions of two maps, along a given graph.

        out[t] = softmax over the tokens s of regions index[r, 0], ..., index[r, K - 1] of (scale q[t] . k[s]) v[s],
        with r the region of t

    Zhu et al. 2023, arXiv:2303.08810, equation 6. The keys of the chosen regions are read where they lie: no implementation
    holds K copies of keys and values, in training neither. A region that is chosen twice for one query counts twice.

    Args:
        q: queries `[B, H, W, N, D]` (batch, height, width, heads, head dim); any strides.
        k: keys `[B, Y, X, N, D]` on a map of the same or another size. Under autocast all three are cast to its dtype.
        v: values `[B, Y, X, N, E]`; E may differ from D.
        regions: into how many rows and columns of regions the queries' map falls; they divide H and W.
        index: which regions of the keys' map, row by row, a region of queries sees: integers `[B, R, K]` with R the number of
            regions of queries and K at least 1, or `[B, N, R, K]` for a choice of its own for every head. Not checked against
            the number of regions, which would wait for the device.
        key_regions: the same of the keys' map; `regions` unless given.
        scale: factor of q . k; D ** -0.5 unless given.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        `[B, H, W, N, E]` in the dtype of q, k, v. Differentiable once in q, k and v (twice in the reference).

    Raises:
        ValueError: shapes, dtypes or devices disagree, regions do not divide a map, or the named implementation does not
            support the call (the message holds its reason).
    """
    (out,) = OP.run(prepare(q, k, v, regions, index, key_regions=key_regions, scale=scale), impl)
    return out


def prepare(q, k, v, regions, index, *, key_regions=None, scale=None) -> AttendRoutedCall:
    """The validated call; raises ValueError with a sentence."""
    check_tensors("attend_routed", q=q, k=k, v=v, dims="[B, H, W, N, D]")
    if k.shape[:4] != v.shape[:4] or k.shape[0] != q.shape[0] or k.shape[3:] != q.shape[3:]:
        raise ValueError(
            f"attend_routed needs q [B, H, W, N, D], k [B, Y, X, N, D] and v [B, Y, X, N, E], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
        )
    q, k, v = autocast(q, k, v)
    if not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"attend_routed needs q, k, v of one dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    key_regions = regions if key_regions is None else key_regions
    if not torch.compiler.is_compiling():  # of symbolic sizes that were padded to a multiple it is known
        for name, x, count in (("queries", q, regions), ("keys", k, key_regions)):
            if min(count) < 1 or x.shape[1] % count[0] or x.shape[2] % count[1]:
                raise ValueError(
                    f"attend_routed cannot cut a {x.shape[1]} x {x.shape[2]} map of {name} into {count[0]} x {count[1]} equal "
                    "regions. Pad the map first."
                )
    B, N, R = q.shape[0], q.shape[3], regions[0] * regions[1]
    if index.is_floating_point() or index.device != q.device:
        raise ValueError(f"attend_routed needs integers on {q.device} as index, got {index.dtype} on {index.device}.")
    shapes = {3: (B, R), 4: (B, N, R)}
    if index.ndim not in shapes or tuple(index.shape[:-1]) != shapes[index.ndim] or index.shape[-1] < 1:
        raise ValueError(
            f"attend_routed needs an index [{B}, {R}, K] or [{B}, {N}, {R}, K] with a K of at least 1, got {list(index.shape)}."
        )
    index = index[:, :, None] if index.ndim == 3 else index.transpose(1, 2)
    return AttendRoutedCall(q, k, v, tuple(regions), tuple(key_regions), index, default_scale(scale, q))


OP = Op(
    "attend_routed",
    prepare,
    (
        Implementation("sdpa", sdpa.supports, sdpa.run),
        # behind sdpa, which takes every call, for the reason that attend2d gives
        Implementation("triton", triton.supports, triton.run),
        Implementation("reference", reference.supports, reference.run),
    ),
)
