"""What no kernel of ours takes, in one sentence each; importable without triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(q: Tensor, **others: Tensor) -> str | None:
    """None, or what about the tensors (`[B, ..., N, D]`, those besides q by name) our kernels cannot run."""
    reason = not_here(q.device)
    for name, tensor in {"q": q, **others}.items():
        reason = reason or no_rows(name, tensor)
        if reason is None and not MIN_HEAD_DIM <= tensor.shape[-1] <= MAX_HEAD_DIM:
            reason = f"it runs head dimensions {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {tensor.shape[-1]}."
    if reason is None and q[0:1].numel() >= 2**31:
        reason = "one image of the output holds 2^31 elements or more."
    return reason


def not_here(device: torch.device) -> str | None:
    """None, or why no kernel of ours runs on this device, in this process or in this graph."""
    if not INSTALLED:
        return "the package triton is not installed."
    if torch.compiler.is_exporting():
        return "exported graphs hold PyTorch's own operations only."
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"it needs a CUDA device, got {device.type}."
    if device.type == "cuda" and _capability(device.index) < 80:
        return "it needs a GPU of compute capability 8.0 or later."
    return None


def no_rows(name: str, tensor: Tensor) -> str | None:
    """None, or why `tensor` `[B, ..., channels]` cannot be read as rows of channels."""
    if tensor.dtype not in DTYPES:
        return f"it runs float16, bfloat16 and float32, got {tensor.dtype}."
    if tensor.dtype == torch.bfloat16 and INTERPRETED:
        return "Triton's interpreter cannot multiply bfloat16."
    if tensor.stride(-1) != 1:
        return f"the head dimension of {name} is not contiguous (stride {tensor.stride(-1)})."
    if sum((n - 1) * s for n, s in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) >= 2**31:
        return f"one image of {name} spans 2^31 elements or more."
    return None


def _capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
