"""Cross-shaped windows as the paper writes them (arXiv:2107.00652, section 3.2 and equation 7), on the weights of ours.

``python benchmarks/formulas/cswin.py [MODEL]`` times a whole model's forward with it and with ours, interleaved.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from compare import compare
from torch import Tensor

from vitzoo.models.cswin import CrossShapedAttention


def formula(mixer: CrossShapedAttention, x: Tensor) -> Tensor:
    """``[B, H, W, C]``, unchanged, at a map size that stripes divide."""
    b, height, width, c = x.shape
    qkv = mixer.qkv(x).view(b, height, width, 3, len(mixer.patterns), c // len(mixer.patterns)).permute(4, 3, 0, 5, 1, 2)
    windows = [(height, width)] if mixer.split is None else [(height, mixer.split), (mixer.split, width)]
    outs = []
    for (q, k, v), (h, w), conv in zip(qkv, windows, mixer.get_v, strict=True):
        channels = v.shape[1]
        cut = [t.reshape(b, channels, height // h, h, width // w, w).permute(0, 2, 4, 1, 3, 5).flatten(0, 2) for t in (q, k, v)]
        lepe = F.conv2d(cut[2], conv.weight, conv.bias, padding=1, groups=channels)
        q, k, v, lepe = (t.reshape(-1, mixer.branch_heads, mixer.head_dim, h * w).transpose(-2, -1) for t in (*cut, lepe))
        out = (q * mixer.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v + lepe
        out = out.transpose(-2, -1).reshape(b, height // h, width // w, channels, h, w)
        outs.append(out.permute(0, 1, 4, 2, 5, 3).reshape(b, height, width, channels))
    return mixer.proj(torch.cat(outs, dim=-1))


if __name__ == "__main__":
    compare(*sys.argv[1:] or ["cswin_tiny"], CrossShapedAttention, formula)
