"""What all ops ask of their tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensors(op: str, dims: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all have the dimensions that `dims` names, a floating dtype and one device."""
    ndim = dims.count(",") + 1
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{op} needs {', '.join(tensors)} on one device, got {', '.join(sorted(map(str, devices)))}.")
    for name, tensor in tensors.items():
        if tensor.ndim != ndim:
            raise ValueError(f"{op} needs {name} as {dims}, got {list(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"{op} needs a floating {name}, got {tensor.dtype}.")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on (fp64 stays, as in PyTorch's own ops)."""
    device = tensors[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
    return tensors


def default_scale(scale: float | None, q: Tensor) -> float:
    """`scale`, or one over the square root of the head dimension."""
    return float(scale) if scale is not None else float(q.shape[-1]) ** -0.5
