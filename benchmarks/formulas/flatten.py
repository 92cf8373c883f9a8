"""Focused linear attention as the paper writes it (arXiv:2308.00442, section 4), on the weights of our mixer.

``python benchmarks/formulas/flatten.py [MODEL]`` times a whole model's forward with it and with ours, interleaved.
"""

from __future__ import annotations

import sys

import torch.nn.functional as F
from compare import compare
from torch import Tensor

from vitzoo.layers import FocusedLinearAttention


def formula(mixer: FocusedLinearAttention, x: Tensor) -> Tensor:
    """``[B, H, W, C]``, unchanged, at the map size that the mixer was built for and without reduced keys."""
    b, height, width, c = x.shape
    heads, d = mixer.num_heads, mixer.head_dim
    x = x.reshape(b, -1, c)
    q, k, v = mixer.qkv(x).chunk(3, -1) if mixer.packed else (mixer.q(x), *mixer.kv(x).chunk(2, -1))

    def phi(t: Tensor) -> Tensor:
        t = (F.relu(t) + 1e-6) / F.softplus(mixer.scale)
        powers = t**mixer.focusing_factor
        return powers / powers.norm(dim=-1, keepdim=True) * t.norm(dim=-1, keepdim=True)

    q, k, v = (t.reshape(b, -1, heads, d).transpose(1, 2) for t in (phi(q), phi(k + mixer.positional_encoding), v))
    out = (q @ (k.transpose(-2, -1) @ v / k.shape[2])) / (q @ k.mean(2, keepdim=True).transpose(-2, -1) + 1e-6)
    values = v.transpose(-2, -1).reshape(b * heads, d, height, width)
    local = F.conv2d(values, mixer.dwc.weight, mixer.dwc.bias, padding=mixer.dwc.kernel_size[0] // 2, groups=d)
    out = (out + local.reshape(b, heads, d, -1).transpose(-2, -1)).transpose(1, 2).reshape(b, height, width, c)
    if mixer.get_v is not None:
        out = out + mixer.get_v(v.transpose(1, 2).reshape(b, height, width, c))
    return mixer.proj(out)


if __name__ == "__main__":
    compare(*sys.argv[1:] or ["flatten_swin_tiny"], FocusedLinearAttention, formula)
