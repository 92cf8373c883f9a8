"""Attention without a softmax: a Gaussian kernel of queries, by way of landmarks and Newton's inverse.

Lu et al. 2021, arXiv:2110.11945 (SOFT), and Lu et al. 2022, arXiv:2207.03341 (SOFT-Norm).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads
from vitzoo.layers.linear import Linear
from vitzoo.layers.maps import are_cells, with_spare_cells
from vitzoo.layers.mixers import Slot, register_mixer

for _name in ("softmax_free", "with_spare_cells"):
    torch.fx.wrap(_name)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """``exp(-|a - b|^2 / 2)`` of all pairs: ``[B, L, D]`` and ``[B, S, D]`` to ``[B, L, S]``."""
    squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
    return torch.exp(torch.baddbmm(squares, a, b.mT, beta=-0.5))


def newton(p: Tensor, y: Tensor, steps: int) -> Tensor:
    """The inverse of ``p`` from a first guess ``y``: ``y = 2 y - y p y``, ``steps`` times; all ``[B, M, M]``.

    By ``bmm``, since ``@`` asks about sizes, which a captured graph answers 20 times.
    """
    for _ in range(steps):
        y = torch.baddbmm(y, torch.bmm(y, p), y, beta=2, alpha=-1)
    return y


def inverse(kernel: Tensor, steps: int) -> Tensor:
    """SOFT's inverse of ``kernel + I / 100``, section 3.3: ``[B * N, M, M]``, each matrix by itself.

    Its gradient is that of an inverse, ``-Y^T G Y^T``, not that of the steps, as published.
    """
    with torch.no_grad():
        p = kernel + 0.01 * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        guess = 1.8 / kernel.sum(-1, keepdim=True).amax(-2, keepdim=True).square()
        y = newton(p, guess * p, steps)
    return torch.baddbmm(y, torch.bmm(y, kernel - kernel.detach()), y, alpha=-1)


def normed_inverse(kernel: Tensor, steps: int, dims: tuple[int, ...]) -> Tensor:
    """SOFT-Norm's ``D^-1/2 kernel^-1 D^-1/2``, D the sums of rows; section 3.4 of the second paper: ``[B * N, M, M]``.

    The first guess is a multiple of the kernel, halved, ten times at most, until it is near enough. Its factor is one for all
    that lies along ``dims``: (0, 1) for the whole batch, (1,) for each image and head. The gradient is that of the steps.
    """
    sums = kernel.sum(-1)
    factor = 2 / sums.amax(dims, keepdim=True).square().unsqueeze(-1)
    with torch.no_grad():
        square = torch.bmm(kernel, kernel)
        one = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        share = kernel.new_ones(())
        for _ in range(10):
            far = (one - factor * share * square).abs().sum(-2).amax(dims, keepdim=True).unsqueeze(-1)
            share = torch.where(far > 1.01, 0.5, 1.0) * share
    root = sums.rsqrt()
    return root.unsqueeze(-1) * newton(kernel, factor * share * kernel, steps) * root.unsqueeze(-2)


def softmax_free(q: Tensor, v: Tensor, landmarks: Tensor, ratio: int, steps: int, dims: tuple[int, ...]) -> Tensor:
    """``k(q, l) inverse(k(l, l)) k(l, q) v``, equation 8 of the first paper, at least in fp32.

    Args:
        q: queries, which are the keys too, ``[B, H, W, N, D]``.
        v: values, likewise.
        landmarks: ``[B * N, M, D]``, spare cells included.
        ratio: tokens on a side of a landmark's cell.
        steps: steps of the inverse.
        dims: SOFT-Norm's, see ``normed_inverse``; () for SOFT.

    Returns:
        ``[B, H, W, N, D]`` in the dtype of v.
    """
    height, width, heads = q.shape[1], q.shape[2], q.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        tokens, values = (t.to(wide).permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1) for t in (q, v))
        landmarks = landmarks.to(wide)
        seen, kernel = gaussian(tokens, landmarks), gaussian(landmarks, landmarks)
        if torch.compiler.is_compiling():  # a spare landmark is seen by nobody, and its own inverse
            real = are_cells(q, ratio)
            seen = torch.where(real, seen, 0.0)
            kernel = torch.where(real[:, None] & real, kernel, torch.diag((~real).to(wide)))
        inverted = normed_inverse(kernel, steps, dims) if dims else inverse(kernel, steps)
        out = torch.bmm(seen, torch.bmm(inverted, torch.bmm(seen.mT, values)))
        return out.unflatten(0, (-1, heads)).unflatten(2, (height, width)).permute(0, 2, 3, 1, 4).to(v.dtype)


class HeadwiseConv(nn.Conv2d):
    """A convolution with one kernel for each head, which all its channels share, no bias: ``[B, H, W, N, D]``, unchanged."""

    def __init__(self, num_heads: int, size: int) -> None:
        super().__init__(num_heads, num_heads, size, padding=size // 2, groups=num_heads, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        kernel = self.weight.repeat_interleave(dim, dim=0)
        out = F.conv2d(x.flatten(-2).permute(0, 3, 1, 2), kernel, padding=self.padding, groups=self.groups * dim)
        return out.permute(0, 2, 3, 1).unflatten(-1, (self.groups, dim))


@register_mixer("softmax_free")
class SoftmaxFreeAttention(nn.Module):
    """Gaussian attention by way of landmarks, and a convolution of v with one kernel for each head.

    Args:
        slot: the place.
        ratio: tokens on a side of a landmark's cell; a map has to hold one.
        size: rows and columns of the convolution.
        normed: SOFT-Norm's inverse.
        batch_statistic: SOFT-Norm: its first guess follows the whole batch.
        steps: Newton steps of the inverse.

    Shape: ``[B, H, W, C]``, unchanged, H and W at least ``ratio``.
    """

    def __init__(
        self,
        slot: Slot,
        *,
        ratio: int = 2,
        size: int = 3,
        normed: bool = False,
        batch_statistic: bool = True,
        steps: int = 20,
    ) -> None:
        super().__init__()
        dim = check_heads(slot.dim, slot.num_heads)
        self.split, self.ratio, self.steps = (slot.num_heads, dim), ratio, steps
        self.dims: tuple[int, ...] = ((0, 1) if batch_statistic else (1,)) if normed else ()
        self.sees_batch = 0 in self.dims
        self.q = Linear(slot.dim, slot.dim, bias=slot.qkv_bias)
        self.v = Linear(slot.dim, slot.dim, bias=slot.qkv_bias)
        self.landmarks = nn.Conv2d(dim, dim, ratio, stride=ratio, bias=False)
        self.norm = nn.LayerNorm(dim)
        self.local = HeadwiseConv(slot.num_heads, size)
        self.proj = Linear(slot.dim, slot.dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def choose(self, q: Tensor) -> Tensor:
        """Landmarks ``[B * N, M, D]`` of scaled queries ``[B, H, W, N, D]``: each a function of its cell."""
        cells = self.landmarks(with_spare_cells(q, self.ratio).permute(0, 3, 4, 1, 2).flatten(0, 1))
        return F.gelu(self.norm(cells.flatten(2).mT))

    def attend(self, q: Tensor, v: Tensor) -> Tensor:
        """From q and v ``[B, H, W, N, D]`` to the same shape."""
        q = q * self.split[1] ** -0.25  # computed here: a captured graph takes a float of a module for a variable
        return softmax_free(q, v, self.choose(q), self.ratio, self.steps, self.dims) + self.local(v)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (layer(x).unflatten(-1, self.split) for layer in (self.q, self.v))
        return self.proj_drop(self.proj(self.attend(q, v).flatten(-2)))
