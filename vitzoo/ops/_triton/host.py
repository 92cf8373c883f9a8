"""What every launch asks of its tensors: strides in units, precision, device, size."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


def power(n: int) -> int:
    """The power of two not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def architecture(tensor: Tensor) -> int:
    """80, 90, 100, ... for a CUDA tensor; 0 in the interpreter."""
    return torch.cuda.get_device_capability(tensor.device)[0] * 10 if tensor.is_cuda else 0


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 inputs are rounded, as PyTorch's own matrix products are told to: to TF32, or not.

    Three TF32 products keep fp32's accuracy; exact ones ("ieee") leave the tensor cores, and their registers spill by the
    thousand at these tiles. Products of half types do not look at this.
    """
    return "tf32x3" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def common_unit(*tensors: Tensor) -> int:
    """The largest of 8, 4, 2, 1 that divides every stride but the last: the compiler then knows that rows begin on 16 bytes.

    Triton itself looks at divisibility by 16 only, and would lose 16-byte loads silently at head dimension 24.
    """
    return math.gcd(8, *(stride for t in tensors for stride in t.stride()[:-1]))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """The tensor's GPU as the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def common_strides(unit: int, axes: str, **tensors: Tensor) -> dict[str, int]:
    """Strides in units of `unit` elements by parameter name: `q_b, q_t, q_n, k_b, ...` for q, k and the axes "btn"."""
    return {f"{name}_{axis}": t.stride(dim) // unit for name, t in tensors.items() for dim, axis in enumerate(axes)}


def readable(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient as kernels read it: zeros for none, rows of contiguous channels, one image within 2^31 elements."""
    grad = torch.zeros_like(like) if grad is None else grad
    return grad if grad.stride(-1) == 1 and inside_int32(grad) else grad.contiguous()


ENOUGH_PROGRAMS = 512
"""Programs that fill a large GPU a few times over; with fewer, what each of them walks through is split."""


def split(programs: int, partners: int, tile: int, least: int) -> tuple[int, int]:
    """(parts, partners in each) so that there are programs enough; a chunk is a whole number of tiles.

    least: partners that are worth a part of their own.
    """
    parts = max(1, min(ENOUGH_PROGRAMS // max(programs, 1), partners // least))
    chunk = -(-partners // parts)
    chunk = -(-chunk // tile) * tile
    return -(-partners // chunk) if partners else 1, max(chunk, tile)


def inside_int32(tensor: Tensor) -> bool:
    """Whether one image's elements lie within 2^31 of its first: kernels count there in 32 bits."""
    return sum((n - 1) * abs(s) for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) < 2**31


class Tiles(NamedTuple):
    """Tokens of a query tile and of a key tile, warps, stages of the software pipeline."""

    BQ: int
    BK: int
    warps: int
    stages: int


@functools.lru_cache(1024)
def flash_tiles(name: str, L: int, S: int, D: int, dtype: torch.dtype, arch: int, at_points: bool = False) -> Tiles:
    """64 x 64 tokens where they fit, fewer for long rows and for tables that are read at points, no more than there are.

    name: "dkv" keeps a tile of keys and walks through queries, other passes the other way round; "forward" has room for more.
    """
    row = max(16, power(D)) * dtype.itemsize // 2  # 16-bit numbers of a row
    short = row <= 64 and dtype.itemsize == 2 and not at_points
    side = 64 if short else 32 if row <= 256 else 16
    # from sm_100 on a product of 64 rows goes to tcgen05, which doubles the work per thread; 32 rows stay with mma.sync
    own_side = min(side, 32) if arch >= 100 else side
    other_side = side if name == "forward" or not short else 32
    if at_points and name == "dkv":  # four entries for each pair and their differences
        other_side = 16
    own_tokens, other_tokens = (S, L) if name == "dkv" else (L, S)
    own, partner = max(16, min(own_side, power(own_tokens))), max(16, min(other_side, power(other_tokens)))
    warps = 2 if own <= 32 and short else 4 if row <= 256 else 8
    stages = 2 if row <= 128 else 1
    return Tiles(partner, own, warps, stages) if name == "dkv" else Tiles(own, partner, warps, stages)
