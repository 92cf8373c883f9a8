"""Channels that attend to each other with the projections of a timm layer: DaViT, arXiv:2204.03645, section 3.2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.layers.linear import linear
from vitzoo.ops import channel_attend

for _name in ("channel_attend", "linear", "over_channels"):
    torch.fx.wrap(_name)


def over_channels(x: Tensor, heads: int, second: bool, scale: float | None) -> Tensor:
    """Channel attention of packed q, k, v ``[B, H, W, 3 C]``, first or second version; ``scale`` None: by tokens."""
    q, k, v = x.flatten(1, 2).unflatten(-1, (3, heads, -1)).unbind(2)
    if not second:
        q, k, v = k, v, q  # as published, q plays the value's part
    out = channel_attend(q, k, v, scale=q.shape[1] ** -0.5 if scale is None else scale)
    return out.reshape(x.shape[0], x.shape[1], x.shape[2], -1)


class GroupedChannelAttention(nn.Module):
    """The channels of a head attend to each other over all tokens of a map ``[B, H, W, C]``; both of timm's versions."""

    def __init__(self, theirs: Any, *, second: bool) -> None:
        super().__init__()
        self.num_heads = theirs.groups if second else theirs.num_heads
        by_tokens = second and theirs.dynamic_scale
        self.second, self.scale = second, None if by_tokens else (theirs.head_dim**-0.5 if second else theirs.scale)
        self.qkv, self.proj = theirs.qkv, theirs.proj

    def forward(self, x: Tensor) -> Tensor:
        out = over_channels(linear(x, self.qkv.weight, self.qkv.bias), self.num_heads, self.second, self.scale)
        return linear(out, self.proj.weight, self.proj.bias)
