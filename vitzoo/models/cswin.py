"""CSWin Transformer. Dong et al. 2022, arXiv:2107.00652.

New here: half of a block's heads attend in vertical stripes and half in horizontal ones, so a token sees a cross through
the whole map after one block. Stripes widen from stage to stage; in the last one every head sees everything. Positions
come from LePE: a depthwise 3x3 convolution of v inside each stripe, added to the output.

Deviations from the published code: none in what is computed. Any image size, as in the published dense backbone: q, k and
v of a map that stripes do not divide are padded with zeros after the projection, half of them at the top and left, and
the padded keys count in the softmax. The published classifier takes one branch instead of two where a stripe covers the
map that it is built for, which has the same parameters in another order; here ``split_size`` None says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers import Block, ConvDownsample, DepthwiseConv, Linear, Mlp, OverlapPatchEmbed, Slot
from vitzoo.layers.attention import check_heads
from vitzoo.layers.maps import padded_size
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family
from vitzoo.ops import attend2d
from vitzoo.patterns import everywhere, stripe

for _name in ("attend2d", "cut_out", "fold", "pad_around", "unfold"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class CSWinConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        split_size: for each stage the width of its stripes in tokens; None: one branch over the whole map.
    """

    embed_dim: int = 64
    depths: tuple[int, ...] = (1, 2, 21, 1)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    split_size: tuple[int | None, ...] = (1, 2, 7, None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.split_size) != len(self.depths):
            raise ValueError(
                f"split_size {self.split_size} names {len(self.split_size)} stages, depths {self.depths} {len(self.depths)}. "
                "Give one entry for each stage in both."
            )


def pad_around(x: Tensor, multiple: tuple[int, int]) -> Tensor:
    """Zeros around a map ``[B, H, W, ...]`` until ``multiple`` divides it; the larger half at the bottom and right."""
    widths = []
    for n, m in zip(x.shape[1:3], multiple, strict=True):
        extra = padded_size(n, m) - n
        widths.append((extra // 2, extra - extra // 2))
    (top, bottom), (left, right) = widths
    if not torch.compiler.is_compiling() and (top, bottom, left, right) == (0, 0, 0, 0):
        return x
    return F.pad(x, (*(0, 0) * (x.ndim - 3), left, right, top, bottom))


def cut_out(x: Tensor, like: Tensor) -> Tensor:
    """Undoes ``pad_around``: the middle of ``x`` ``[B, H', W', ...]`` in the size of ``like`` ``[B, H, W, ...]``."""
    height, width = like.shape[1], like.shape[2]
    top, left = (x.shape[1] - height) // 2, (x.shape[2] - width) // 2
    if torch.compiler.is_compiling():  # gathered: a slice asks whether H <= H'
        rows, cols = (torch.arange(n, device=x.device) for n in (height, width))
        return x[:, rows[:, None] + top, cols[None] + left]
    if (height, width) == (x.shape[1], x.shape[2]):
        return x
    return x[:, top : top + height, left : left + width]


def fold(x: Tensor, along: str, width: int) -> Tensor:
    """A map in which a 3x3 convolution does not reach across the borders of stripes.

    Args:
        x: ``[B, H, W, C]``.
        along: "rows" or "cols": what a stripe is ``width`` of; ``width`` divides their number.
        width: rows or columns of a stripe.

    Returns:
        Every stripe as a map of its own, ``[B * stripes, rows, cols, C]``. While a graph is captured, the map with a line
        of zeros behind every stripe, which holds for any number of stripes, one included.
    """
    dim = 1 if along == "rows" else 2
    if torch.compiler.is_compiling():
        place = torch.arange(x.shape[dim] // width * (width + 1), device=x.device)
        inside = place % (width + 1)
        x = x.index_select(dim, place // (width + 1) * width + inside.clamp(max=width - 1))
        return x * (inside < width).to(x.dtype).view((-1, 1, 1) if dim == 1 else (-1, 1))
    stripes = x.unflatten(dim, (x.shape[dim] // width, width))
    return (stripes if dim == 1 else stripes.transpose(1, 2)).flatten(0, 1)


def unfold(x: Tensor, like: Tensor, along: str, width: int) -> Tensor:
    """What ``fold`` made, as a map again, in the shape of ``like`` ``[B, H, W, ...]``."""
    dim = 1 if along == "rows" else 2
    if torch.compiler.is_compiling():
        place = torch.arange(like.shape[dim], device=x.device)
        x = x.index_select(dim, place // width * (width + 1) + place % width)
    elif dim == 2:
        x = x.unflatten(0, (like.shape[0], like.shape[2] // width)).transpose(1, 2)
    return x.reshape(like.shape)


class CrossShapedAttention(nn.Module):
    """Attention in vertical stripes for one half of the heads and in horizontal ones for the other, section 3.2.

        softmax(q k^T / sqrt(D)) v + LePE(v)

    Args:
        dim: channels C.
        num_heads: heads N; C divides by it, and it is even where there are two branches.
        split: tokens across a stripe; None: one branch with all heads, in which everybody sees everybody.
        qkv_bias: learn a bias in the projection to q, k, v.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: an odd number of heads for two branches, or one that does not divide the channels.

    Shape: ``[B, H, W, C]``, unchanged, any H and W.
    """

    def __init__(self, dim: int, num_heads: int, split: int | None, *, qkv_bias: bool = True, proj_drop: float = 0.0) -> None:
        super().__init__()
        if split is not None and num_heads % 2:
            raise ValueError(f"{num_heads} heads do not divide into vertical and horizontal ones. Take an even number.")
        self.split = split
        self.patterns = (everywhere,) if split is None else (stripe(cols=split), stripe(rows=split))
        self.head_dim = check_heads(dim, num_heads)
        self.branch_heads = num_heads // len(self.patterns)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.get_v = nn.ModuleList(DepthwiseConv(dim // len(self.patterns)) for _ in self.patterns)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, len(self.patterns), self.branch_heads, self.head_dim))
        out = [self.branch(i, qkv.select(-3, i)) for i in range(len(self.patterns))]
        return self.proj_drop(self.proj((out[0] if len(out) == 1 else torch.cat(out, dim=-2)).flatten(-2)))

    def branch(self, i: int, qkv: Tensor) -> Tensor:
        """Attention and LePE along one direction: ``[B, H, W, 3, n, D]`` to ``[B, H, W, n, D]``."""
        if self.split is None:
            q, k, v = qkv.unbind(3)
            return attend2d(q, k, v, everywhere) + self.get_v[i](v.flatten(-2)).unflatten(
                -1, (self.branch_heads, self.head_dim)
            )
        along, multiple = ("rows", (self.split, 1)) if i else ("cols", (1, self.split))
        padded = pad_around(qkv, multiple)
        q, k, v = padded.unbind(3)
        lepe = self.get_v[i](fold(v.flatten(-2), along, self.split))
        return cut_out(attend2d(q, k, v, self.patterns[i]) + unfold(lepe, v, along, self.split), qkv)

    def extra_repr(self) -> str:
        return f"patterns={self.patterns!r}"


class CSWin(Pyramid):
    """Cross-shaped windows on the pyramid trunk."""

    Config = CSWinConfig

    cfg: CSWinConfig

    def make_stem(self) -> nn.Module:
        return OverlapPatchEmbed(self.cfg.dims[0], 7, 4, self.cfg.in_chans, padding=2)

    def make_downsample(self, i: int) -> nn.Module:
        return ConvDownsample(self.cfg.dims[i - 1], self.cfg.dims[i], bias=True)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        kwargs: Any = {"qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: CrossShapedAttention(cfg.dims[i], cfg.num_heads[i], cfg.split_size[i], **kwargs)),
            mlp=Mlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
        )

    def slot(self, i: int, j: int) -> Slot:
        return replace(super().slot(i, j), lepe=True)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: CSWinConfig) -> dict[str, Tensor]:
        """From microsoft/CSWin-Transformer, its dense backbone, and the CSWin hosts of FLatten and Agent attention."""
        ours = {}
        for key, value in state.items():
            if match := re.match(r"stage(\d)\.(\d+)\.(?:(attns)\.(\d)\.)?(.*)", key):
                i, j, rest = int(match[1]) - 1, int(match[2]), match[5]
                if match[3]:  # of one branch; another mixer has but one
                    own = cfg.mixer_of(i, j) is None
                    rest = rest.replace("get_v.", f"attn.get_v.{match[4]}.") if own else f"attn.{rest}"
                key = f"stages.{i}.blocks.{j}." + re.sub(r"^(qkv|proj)\.", r"attn.\1.", rest)
            key = re.sub(r"^merge(\d)", r"stages.\1.downsample", key).replace("downsample.conv.", "downsample.reduction.")
            key = key.replace("stage1_conv_embed.0.", "stem.proj.").replace("stage1_conv_embed.2.", "stem.norm.")
            key = re.sub(r"^norm(\d)", lambda m: f"feature_norms.{int(m[1]) - 1}", key)
            ours[re.sub(r"^head\.(?!fc\.)", "head.fc.", key)] = value
        return ours


_TINY = CSWinConfig(drop_path_rate=0.2)
_SMALL = replace(_TINY, depths=(2, 4, 32, 2), drop_path_rate=0.4)
_BASE = replace(_SMALL, embed_dim=96, num_heads=(4, 8, 16, 32), drop_path_rate=0.5)
_LARGE = replace(_SMALL, embed_dim=144, num_heads=(6, 12, 24, 24), drop_path_rate=0.2)
_384: Any = {"split_size": (1, 2, 12, None), "img_size": 384}

VARIANTS = {
    "cswin_micro": CSWinConfig(
        embed_dim=16, depths=(1, 1, 1), num_heads=(2, 2, 4), mlp_ratio=2.0, split_size=(1, 3, None), img_size=32
    ),
    "cswin_tiny": _TINY,
    "cswin_small": _SMALL,
    "cswin_base": _BASE,
    "cswin_base_384": replace(_BASE, **_384, drop_path_rate=0.7),
    "cswin_large": _LARGE,
    "cswin_large_384": replace(_LARGE, **_384),
}

register_family(__name__, CSWin, VARIANTS, first_conv="stem.proj")
