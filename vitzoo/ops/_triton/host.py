"""What every launch asks of its tensors: strides in units, precision, device, size."""

from __future__ import annotations

import contextlib
import math

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


def inside_int32(tensor: Tensor) -> bool:
    """Whether one image's elements lie within 2^31 of its first: kernels count there in 32 bits."""
    return sum((n - 1) * abs(s) for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) < 2**31
