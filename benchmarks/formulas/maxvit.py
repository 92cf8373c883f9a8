"""MaxViT's block as the paper writes it (arXiv:2204.01697, section 3), on the weights of ours.

``python benchmarks/formulas/maxvit.py [MODEL]`` times a whole model's forward with it and with ours, interleaved.
"""

from __future__ import annotations

import sys

import torch
from compare import compare
from torch import Tensor, nn

from vitzoo.models.maxvit import MaxViTBlock


def formula(block: MaxViTBlock, x: Tensor) -> Tensor:
    """``[B, H, W, C]`` to ``[B, H', W', C']`` where windows and grid divide the map, in the official flavor."""
    conv = block.conv
    x = x.permute(0, 3, 1, 2)
    y = conv.act(conv.norm1(conv.conv1_1x1(conv.pre_norm(x))))
    y = conv.act(conv.norm2(conv.conv2_kxk(y)))
    x = (conv.shortcut(x) + conv.conv3_1x1(conv.se(y))).permute(0, 2, 3, 1)

    b, height, width, c = x.shape
    p, q = ((entries + 1) // 2 for entries in block.attn_block.attn.rel_bias.shape[1:])
    windows = x.reshape(b, height // p, p, width // q, q, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, p * q, c)
    x = half(block.attn_block, windows, p, q).reshape(b, height // p, width // q, p, q, c).permute(0, 1, 3, 2, 4, 5)
    cells = x.reshape(b, p, height // p, q, width // q, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, p * q, c)
    x = half(block.attn_grid, cells, p, q).reshape(b, height // p, width // q, p, q, c).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, height, width, c)


def half(block: nn.Module, x: Tensor, p: int, q: int) -> Tensor:
    """Attention with relative positions inside every group of p x q tokens, and the MLP: ``[groups, p * q, C]``, unchanged."""
    attn = block.attn
    query, key, value = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    row, col = torch.meshgrid(torch.arange(p), torch.arange(q), indexing="ij")
    dy, dx = (place.flatten()[None, :] - place.flatten()[:, None] for place in (row, col))  # key minus query
    scores = query @ key.transpose(-2, -1) * attn.head_dim**-0.5 + attn.rel_bias[:, dy + p - 1, dx + q - 1]
    x = x + attn.proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


if __name__ == "__main__":
    compare(*sys.argv[1:] or ["maxvit_tiny_tf_224"], MaxViTBlock, formula)
