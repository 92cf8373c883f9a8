"""A linear layer that is faster in inference on a CPU, and the MLP made of two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.conv import DepthwiseConv

_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``: ``[..., in]`` to ``[..., out]``.

    Eager fp32 inference on a CPU goes through oneDNN, by the operator that torch.compile emits for the same layer:
    ``F.linear`` takes MKL there and first writes the bias into the whole output, which is 5 % of a Swin-T slower.
    Everything else is ``F.linear``.
    """
    if _takes_onednn(x, weight):
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether nobody differentiates, captures, casts or counts this call, and both sides are plain fp32 CPU tensors."""
    if _onednn is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.jit.is_tracing():
        return False
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter) or not x.numel():
        return False
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    return not torch.is_autocast_enabled("cpu") and not torch._C._len_torch_dispatch_stack()  # a FLOP counter, a fake


torch.fx.wrap("linear")


class Linear(nn.Linear):
    """``nn.Linear`` by way of ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """Two linear layers with a GELU between; keys are those of timm's ``Mlp``.

    Args:
        dim: channels in and out.
        hidden: channels between.
        drop: dropout after both layers.
        gelu: "none" for the exact GELU, "tanh" for its approximation.

    Shape: ``[..., dim]``, unchanged.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, gelu: str = "none") -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.act = nn.GELU(gelu)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def hidden(self, x: Tensor) -> Tensor:
        """What the GELU is applied to: ``[..., hidden]``, in memory of its own."""
        return self.fc1(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.hidden(x)))))


class DepthwiseMlp(Mlp):
    """An MLP that sees its neighbours: a depthwise 3x3 convolution of the hidden map before the GELU (PVT v2).

    Args:
        dim: channels in and out.
        hidden: channels between.
        drop: dropout after both layers.
        residual: add the convolution to the hidden map (DAT++, SMT) instead of replacing it.

    Shape: ``[B, H, W, dim]``, unchanged.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, residual: bool = False) -> None:
        super().__init__(dim, hidden, drop)
        self.residual = residual
        self.dwconv = DepthwiseConv(hidden)

    def hidden(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return x + self.dwconv(x) if self.residual else self.dwconv(x)
