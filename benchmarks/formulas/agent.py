"""Agent attention as the paper writes it (arXiv:2312.08874, equations 4 to 6), on the weights of our mixer.

``python benchmarks/formulas/agent.py [MODEL]`` times a whole model's forward with it and with ours, interleaved.
"""

from __future__ import annotations

import sys

import torch.nn.functional as F
from compare import compare
from torch import Tensor

from vitzoo.layers import AgentAttention


def formula(mixer: AgentAttention, x: Tensor) -> Tensor:
    """``[B, H, W, C]``, unchanged, at the map size that the mixer was built for."""
    b, height, width, c = x.shape
    heads, d = mixer.num_heads, c // mixer.num_heads
    if mixer.packed:
        q, k, v = mixer.qkv(x).chunk(3, dim=-1)
    else:
        q, (k, v) = mixer.q(x), mixer.kv(x).chunk(2, dim=-1)
    agents = F.adaptive_avg_pool2d(q.permute(0, 3, 1, 2), mixer.grid).flatten(2).transpose(1, 2)

    def split(t):
        return t.reshape(b, -1, heads, d).transpose(1, 2)

    def enlarge(table):
        return F.interpolate(table, size=(height, width), mode="bilinear")

    key_bias = (enlarge(mixer.an_bias) + (mixer.ah_bias + mixer.aw_bias)[0]).flatten(2)
    query_bias = enlarge(mixer.na_bias).permute(0, 2, 3, 1).flatten(1, 2) + (mixer.ha_bias + mixer.wa_bias)[0].flatten(1, 2)
    a = split(agents)
    read = ((a * d**-0.5) @ split(k).transpose(-2, -1) + key_bias).softmax(-1) @ split(v)
    out = ((split(q) * d**-0.5) @ a.transpose(-2, -1) + query_bias).softmax(-1) @ read
    out = out.transpose(1, 2).reshape(b, height, width, c)
    convolve = mixer.get_v if mixer.dwc is None else mixer.dwc
    return mixer.proj(
        out + F.conv2d(v.permute(0, 3, 1, 2), convolve.weight, convolve.bias, padding=1, groups=c).permute(0, 2, 3, 1)
    )


if __name__ == "__main__":
    compare(*sys.argv[1:] or ["agent_swin_tiny"], AgentAttention, formula)
