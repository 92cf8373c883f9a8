"""Deformable attention as the paper writes it (arXiv:2201.00520, equations 3 to 8), on the weights of our layer.

``python benchmarks/formulas/dat.py [MODEL]`` times a whole model's forward with it and with ours, interleaved.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from compare import compare
from torch import Tensor

from vitzoo.layers import DeformableAttention


def formula(layer: DeformableAttention, x: Tensor) -> Tensor:
    """``[B, H, W, C]``, unchanged, for a relative position table."""
    b, height, width, c = x.shape
    groups, heads, d = layer.groups, layer.num_heads, layer.head_dim
    net, q = layer.offset, layer.q(x).permute(0, 3, 1, 2)
    assert net is not None
    assert layer.kind == "table"
    split = q.reshape(b * groups, c // groups, height, width)
    offsets = F.conv2d(split, net.conv.weight, net.conv.bias, net.stride, net.padding, groups=c // groups)
    offsets = net.proj(net.act(net.norm(offsets.permute(0, 2, 3, 1))))  # [B G, Hk, Wk, 2]
    rows, cols = offsets.shape[1:3]
    first = layer.version == 1
    less = 0 if first else 1
    reference = torch.stack(
        torch.meshgrid(*((torch.arange(n) + 0.5) / (n - less) * 2 - 1 for n in (rows, cols)), indexing="ij"), dim=-1
    )
    if layer.offset_range > 0:
        reach = torch.tensor([1 / (rows - less), 1 / (cols - less)]) * layer.offset_range
        points = reference + offsets.tanh() * reach
    else:
        points = (reference + offsets).tanh() if first else (reference + offsets).clamp(-1, 1)

    maps = x.permute(0, 3, 1, 2).reshape(b * groups, c // groups, height, width)
    sampled = F.grid_sample(maps, points.flip(-1), align_corners=True).reshape(b, c, rows * cols).transpose(1, 2)
    n, samples = height * width, rows * cols
    q = q.reshape(b, heads, d, n).transpose(-2, -1)
    k, v = (project(sampled).reshape(b, samples, heads, d).transpose(1, 2) for project in (layer.k, layer.v))
    axes = [(torch.arange(n) + 0.5) / n * 2 - 1 if first else torch.arange(n) / (n - 1) * 2 - 1 for n in (height, width)]
    queries = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(1, n, 1, 2)
    displacement = (queries - points.reshape(b * groups, 1, samples, 2)) / 2
    table = layer.rel_bias.flip(1, 2).reshape(1, groups, heads // groups, *layer.rel_bias.shape[1:]).expand(b, -1, -1, -1, -1)
    bias = F.grid_sample(table.flatten(0, 1), displacement.flip(-1), align_corners=True).reshape(b, heads, n, samples)
    out = (q @ k.transpose(-2, -1) * d**-0.5 + bias).softmax(-1) @ v
    return layer.proj(out.transpose(1, 2).reshape(b, height, width, c))


if __name__ == "__main__":
    compare(*sys.argv[1:] or ["dat_pp_tiny"], DeformableAttention, formula)
