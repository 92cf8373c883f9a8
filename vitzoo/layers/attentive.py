"""A depthwise convolution whose kernel is computed from the image: AttNet, arXiv:2510.20092, section 4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.linear import Linear
from vitzoo.layers.mixers import Slot, register_mixer

for _name in ("convolve_each", "strip_means"):
    torch.fx.wrap(_name)


def strip_means(x: Tensor, strips: int) -> Tensor:
    """Means of a map ``[B, H, W, C]`` over ``strips`` runs of its tokens, row after row: ``[B, strips, C]``.

    Where the number of tokens does not divide, neighbouring runs share a token, as in adaptive average pooling. Written as
    a product, its gradient needs no atomic sums.
    """
    tokens = x.flatten(1, 2)
    length = tokens.shape[1]
    begin = torch.arange(strips, device=x.device)[:, None] * length
    start, end = begin // strips, (begin + length + strips - 1) // strips
    token = torch.arange(length, device=x.device)
    inside = (token >= start) & (token < end)
    return (inside / (end - start)).to(x.dtype) @ tokens


def convolve_each(x: Tensor, kernels: Tensor) -> Tensor:
    """Every image and channel of a map ``[B, H, W, C]`` with its own kernel ``[B, C, k, k]``, zeros beyond the border."""
    batch, height, width, dim = x.shape
    size = kernels.shape[-1]
    if torch.compiler.is_exporting():  # ONNX has no convolution whose number of groups is the batch's
        near = F.pad(x, (0, 0, *(size // 2,) * 4))
        places = [(i, j) for i in range(size) for j in range(size)]
        return sum(near[:, i : i + height, j : j + width] * kernels[:, None, None, :, i, j] for i, j in places)  # type: ignore[return-value]  # not empty
    planes = x.permute(0, 3, 1, 2).reshape(1, batch * dim, height, width)
    out = F.conv2d(planes, kernels.reshape(batch * dim, 1, size, size), padding=size // 2, groups=batch * dim)
    return out.reshape(batch, dim, height, width).permute(0, 2, 3, 1)


@register_mixer("attentive_conv")
class AttentiveConv(nn.Module):
    """``W (K(x) * (V x))`` with ``K = G - sigmoid(d) mean(G)`` and ``G = M gelu(strip means of W' x)``, section 4.

    The convolution ``*`` is depthwise; M mixes the ``size^2`` strips and is one for all channels, d a number for each.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, slot: Slot, *, size: int = 3) -> None:
        super().__init__()
        dim = slot.dim
        self.size = size
        self.kernel_proj = Linear(dim, dim)
        self.act = nn.GELU()
        self.kernel_gen = Linear(size * size, size * size)
        self.x_proj = Linear(dim, dim)
        self.difference_control = nn.Parameter(torch.zeros(dim))
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        means = strip_means(self.kernel_proj(x), self.size * self.size)
        kernels = self.kernel_gen(self.act(means.transpose(1, 2)))
        kernels = kernels - self.difference_control.sigmoid()[:, None] * kernels.mean(dim=-1, keepdim=True)
        kernels = kernels.unflatten(-1, (self.size, self.size))
        return self.proj_drop(self.proj(convolve_each(self.x_proj(x), kernels)))
