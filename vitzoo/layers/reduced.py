"""Attention to fewer keys than queries: a reduced copy of the map (PVT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitzoo.layers.attention import check_heads
from vitzoo.layers.embed import SpatialReduction
from vitzoo.layers.linear import Linear
from vitzoo.layers.maps import are_cells, pad_map, with_spare_cells
from vitzoo.ops import attend

for _name in ("attend", "spare_keys", "with_cells"):
    torch.fx.wrap(_name)


def with_cells(x: Tensor, ratio: int) -> Tensor:
    """``[B, H, W, C]`` padded to a cell where it is smaller; in an exported graph, which fits all sizes, with a spare one."""
    if ratio == 1:
        return x
    if torch.compiler.is_exporting():
        return with_spare_cells(x, ratio)
    return x if torch.compiler.is_compiling() else pad_map(x, minimum=(ratio, ratio))


def spare_keys(x: Tensor, ratio: int) -> Tensor | None:
    """What hides the spare cells from all queries: ``[B, S]``, or None where there are none."""
    if ratio == 1 or not torch.compiler.is_exporting():
        return None
    real = are_cells(x, ratio)
    return torch.zeros_like(real, dtype=x.dtype).masked_fill(~real, -torch.inf).expand(x.shape[0], -1)


class ReducedAttention(nn.Module):
    """Attention of every token to a reduced copy of the map. Wang et al. 2021, arXiv:2102.12122, section 3.3.

    ``softmax(q k^T / sqrt(D)) v``, q from the map, k and v from cells of ``sr_ratio`` x ``sr_ratio`` tokens.

    Args:
        dim: channels C.
        num_heads: heads N; C divides by it.
        sr_ratio: tokens on a side of a cell; 1 for attention among all tokens.
        qkv_bias: learn a bias in the projections to q and to k, v.
        proj_drop: dropout after the output projection.

    Shape: ``[B, H, W, C]``, unchanged; a map smaller than a cell is padded to one with zeros (not in a captured graph).
    """

    def __init__(self, dim: int, num_heads: int, sr_ratio: int, *, qkv_bias: bool = True, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.sr_ratio = num_heads, check_heads(dim, num_heads), sr_ratio
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = SpatialReduction(dim, sr_ratio) if sr_ratio > 1 else nn.Identity()
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, self.head_dim))
        reduced = self.sr(with_cells(x, self.sr_ratio))
        k, v = self.kv(reduced).flatten(1, 2).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        return self.proj_drop(self.proj(attend(q, k, v, key_bias=spare_keys(x, self.sr_ratio)).reshape(x.shape)))
