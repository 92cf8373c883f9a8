"""sample2d: what a map holds between its tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.ops._validate import check_tensors
from vitzoo.ops.sample2d import grid_sample, reference, triton


class Sample2dCall(NamedTuple):
    """A validated call: what implementations look at and run."""

    x: Tensor
    points: Tensor


def sample2d(x: Tensor, points: Tensor, *, impl: str | None = None) -> Tensor:
    """Bilinear samples of a map at points of its own for each image and group of channels.

        out[b, s, g] = sum_ij max(0, 1 - |y - i|) max(0, 1 - |u - j|) x[b, i, j, g]
        y = (points[b, s, g, 0] + 1) / 2 * (H - 1),    u = (points[b, s, g, 1] + 1) / 2 * (W - 1)

    It makes the keys of deformable attention (Xia et al. 2022, arXiv:2201.00520, equation 4), with `attend` behind it.

    Args:
        x: `[B, H, W, G, C]` (batch, rows, columns, groups, channels of a group), any strides.
        points: `[B, S, G, 2]`: row and column of S samples, in units in which -1 is the centre of the first row or column
            and 1 that of the last (PyTorch's `align_corners=True`, with the row first). Beyond the map lie zeros. Give
            them in fp32 (fp64 for an fp64 map): in bf16 they are off by up to 0.1 pixels on a map of 56.
        impl: name of the implementation that must run; unless given, the first that supports the call.

    Returns:
        `[B, S, G, C]` in the dtype of x. Positions and weights are computed in at least fp32. Differentiable in x and
        points; where a point lies exactly on a token, its gradient is that towards the next one. Autocast changes nothing.
        Under `torch.use_deterministic_algorithms` gradients are summed in one order everywhere (`vitzoo.ops._bilinear` says
        what that costs in PyTorch); in Triton they always are.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the named implementation does not support the call (the message
            holds its reason).
    """
    (out,) = OP.run(prepare(x, points), impl)
    return out


def prepare(x: Tensor, points: Tensor) -> Sample2dCall:
    """The validated call; raises ValueError with a sentence."""
    check_tensors("sample2d", x=x, dims="[B, H, W, G, C]")
    check_tensors("sample2d", points=points, dims="[B, S, G, 2]")
    if x.device != points.device:
        raise ValueError(f"sample2d needs x and points on one device, got {x.device} and {points.device}.")
    if points.shape[0] != x.shape[0] or points.shape[2] != x.shape[3] or points.shape[3] != 2:
        raise ValueError(
            f"sample2d needs x [B, H, W, G, C] and points [B, S, G, 2], got {list(x.shape)}, {list(points.shape)}."
        )
    return Sample2dCall(x, points)


OP = Op(
    "sample2d",
    prepare,
    (
        Implementation("grid_sample", grid_sample.supports, grid_sample.run),
        # behind grid_sample, which takes every call, for the reason that attend2d gives
        Implementation("triton", triton.supports, triton.run),
        Implementation("reference", reference.supports, reference.run),
    ),
)
