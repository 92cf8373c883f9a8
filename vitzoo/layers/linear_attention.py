"""Mixers at a cost linear in the tokens: focused linear attention (FLatten) and attention among channels (DaViT)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers.attention import MixedAttention
from vitzoo.layers.conv import DepthwiseConv
from vitzoo.layers.maps import resize_positions
from vitzoo.layers.mixers import Slot, register_mixer
from vitzoo.ops import channel_attend, linear_attend

EPS = 1e-6
"""Added to every feature before it is focused, and to the mean weight that the output is divided by."""


def focus(t: Tensor, sharpness: Tensor, power: float) -> Tensor:
    """The focused feature map: directions towards their largest channels, lengths unchanged.

        u = (relu(t) + 1e-6) / sharpness,    phi(t) = u^p ||u|| / ||u^p||

    Han et al. 2023, arXiv:2308.00442, section 4. ``u`` is divided by its largest channel before the power, which
    changes nothing in theory: a token without a positive channel would be 0 / 0 in fp32 from p = 4 on.

    Args:
        t: ``[..., C]``, the channels of all heads.
        sharpness: positive, broadcasts to ``t``.
        power: p, at least 1.

    Returns:
        ``[..., C]``, positive, in fp32 (fp64 for fp64).
    """
    u = F.relu(t.to(torch.promote_types(t.dtype, torch.float32)))
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        u = (u + EPS) / sharpness
        largest = u.detach().amax(-1, keepdim=True)  # phi(c u) = c phi(u): as a constant it changes no gradient
        u = u / largest
        powers = u**power
        return powers * (largest * length(u) / length(powers))
    u.add_(EPS).div_(sharpness)
    largest = u.amax(-1, keepdim=True)
    before = length(u.div_(largest))
    return u.pow_(power).mul_(largest * before / length(u))


def length(t: Tensor) -> Tensor:
    """Euclidean length of ``[..., C]``: ``[..., 1]``."""
    return torch.linalg.vector_norm(t, dim=-1, keepdim=True)


def stretch_tokens(x: Tensor, like: Tensor) -> Tensor:
    """A map ``[B, h, w, C]`` in the size of ``like`` ``[B, H, W, ...]``, interpolated along its row-major order."""
    height, width = like.shape[1], like.shape[2]
    tokens = F.interpolate(x.flatten(1, 2).transpose(1, 2), size=height * width, mode="linear", align_corners=False)
    return tokens.transpose(1, 2).unflatten(1, (height, width))


for _name in ("channel_attend", "focus", "linear_attend", "resize_positions", "stretch_tokens"):
    torch.fx.wrap(_name)


class SharedDepthwiseConv(DepthwiseConv):
    """A depthwise convolution whose kernels every head has in common: weight ``[D, 1, size, size]`` on N * D channels.

    Shape: ``[B, H, W, N * D]``, unchanged.
    """

    def __init__(self, head_dim: int, size: int, num_heads: int) -> None:
        super().__init__(head_dim, size)
        self.num_heads = num_heads

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.repeat(self.num_heads, 1, 1, 1), self.bias.repeat(self.num_heads)  # type: ignore[union-attr]
        padding, groups = self.kernel_size[0] // 2, self.num_heads * self.groups
        return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=groups).permute(0, 2, 3, 1)


@register_mixer("focused_linear", prefix=True)
class FocusedLinearAttention(MixedAttention):
    """Focused linear attention: Han et al. 2023, arXiv:2308.00442, section 4.

    ``phi(q) phi(k)^T v / sum phi(q) phi(k)^T`` among all tokens, with the map ``focus`` as phi, over the channels of all
    heads together; and a depthwise convolution of v, which gives back the rank that such attention lacks. The keys carry
    learned positions of the map that the slot names, resized to the map at hand (bicubic).

    Prefix tokens are queries and keys like all others, without a position and without the convolution. This is our
    reading: the authors' code for hosts with a class token is not published.

    Args:
        slot: the place.
        focusing_factor: p of ``focus``.
        kernel_size: rows and columns of the convolution, odd.
        kv_ratio: k and v come from cells of ``kv_ratio`` x ``kv_ratio`` tokens; for the convolution v is then stretched back
            along the row-major order of its tokens, in one dimension, as published.

    Raises:
        ValueError: an even kernel, a focusing factor below 1, or a ``kv_ratio`` beside prefix tokens.
    """

    def __init__(self, slot: Slot, *, focusing_factor: float = 3, kernel_size: int = 5, kv_ratio: int = 1) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"A kernel of {kernel_size} has no middle. Choose an odd kernel_size.")
        if focusing_factor < 1:
            raise ValueError(f"A focusing_factor of {focusing_factor} would blur. Choose one of at least 1.")
        super().__init__(
            slot.dim,
            slot.num_heads,
            packed=slot.packed,
            kv_ratio=kv_ratio,
            lepe=slot.lepe,
            prefix_tokens=slot.prefix_tokens,
            qkv_bias=slot.qkv_bias,
            proj_drop=slot.proj_drop,
        )
        self.focusing_factor = focusing_factor
        self.grid_size = (-(-slot.map_size[0] // kv_ratio), -(-slot.map_size[1] // kv_ratio))
        self.positional_encoding = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], slot.dim))
        self.scale = nn.Parameter(torch.zeros(1, 1, slot.dim))
        self.dwc = SharedDepthwiseConv(self.head_dim, kernel_size, slot.num_heads)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = resize_positions(self.positional_encoding, k, self.grid_size)
        out = self.attend(q.flatten(1, 2), (k + positions).flatten(1, 2), v.flatten(1, 2))
        return out.unflatten(1, (q.shape[1], q.shape[2]))

    def mix_tokens(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        prefix = self.prefix_tokens
        patches = k[:, prefix:].unflatten(1, (height, width))
        patches = (patches + resize_positions(self.positional_encoding, patches, self.grid_size)).flatten(1, 2)
        return self.attend(q, torch.cat([k[:, :prefix], patches], dim=1), v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of q ``[B, L, C]`` to k and v ``[B, S, C]``: ``[B, L, C]``."""
        sharpness = F.softplus(self.scale)
        heads = (self.num_heads, self.head_dim)
        q, k = (focus(t, sharpness, self.focusing_factor).unflatten(-1, heads) for t in (q, k))
        return linear_attend(q, k, v.unflatten(-1, heads), eps=EPS).flatten(-2)

    def resize_state(self, value: Tensor) -> Tensor:
        """A checkpoint's positions of another, square map ``[1, n * n, C]`` as ours; anything else as it is."""
        side = round(value.shape[1] ** 0.5) if value.ndim == 3 else 0
        if value.ndim != 3 or value.shape[1] != side * side or value.shape[2] != self.scale.shape[2]:
            return value
        return resize_positions(value, value.new_empty(1, *self.grid_size, 0), (side, side)).flatten(1, 2)

    def local(self, v: Tensor) -> Tensor:
        """The convolution of v, and LePE where the host has it."""
        lepe = super().local(v)
        return self.dwc(v) if lepe is None else self.dwc(v) + lepe

    def enlarge(self, v: Tensor, like: Tensor) -> Tensor:
        return stretch_tokens(v, like)


@register_mixer("channel", prefix=True)
class ChannelAttention(MixedAttention):
    """Softmax attention among the channels of a head, over all tokens: Ding et al. 2022, arXiv:2204.03645, section 3.3.

    As published it weighs k against v and mixes q; its logits grow with the map. Version 2 (of Florence-2) weighs q
    against k, mixes v, and divides the logits by the square root of the number of tokens.

    Args:
        slot: the place.
        version: 1 or 2.

    Raises:
        ValueError: another version.
    """

    def __init__(self, slot: Slot, *, version: int = 1) -> None:
        if version not in (1, 2):
            raise ValueError(f"Channel attention has the versions 1 and 2, not {version}.")
        super().__init__(
            slot.dim,
            slot.num_heads,
            packed=slot.packed,
            lepe=slot.lepe,
            prefix_tokens=slot.prefix_tokens,
            qkv_bias=slot.qkv_bias,
            proj_drop=slot.proj_drop,
        )
        self.version = version

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.attend(*(t.flatten(1, 2) for t in (q, k, v)))
        return out.unflatten(1, (q.shape[1], q.shape[2]))

    def mix_tokens(self, q: Tensor, k: Tensor, v: Tensor, height: int, width: int) -> Tensor:
        return self.attend(q, k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention on q, k, v ``[B, L, C]``: ``[B, L, C]``."""
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))
        if self.version == 2:
            return channel_attend(q, k, v, scale=q.shape[1] ** -0.5).flatten(-2)
        return channel_attend(k, v, q, scale=self.head_dim**-0.5).flatten(-2)
