"""BiFormer. Zhu et al. 2023, arXiv:2303.08810.

New here: attention that chooses its keys by content in two steps. The map falls into 7 x 7 regions; regions are compared by
the means of their queries and keys, and every token attends to the tokens of the few regions that its own one is most alike.

Deviations from the published code: none in what is computed. Any image size, padded as in the published dense backbones:
with zeros after the norm and before the projection, so that padded tokens are keys. ``layout="stl_nchw"`` pads behind the
projection, in regions of a rounded-down size, as its published op does; that one refuses maps with fewer than 7 tokens a side,
which are padded to 7 here. Of regions that are equally alike the first ones are chosen.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers import (
    BatchNorm,
    Block,
    ConvNorm,
    ConvNormStem,
    DepthwiseConv,
    Linear,
    Mlp,
    PatchEmbed,
    Slot,
    crop_map,
    pad_map,
    register_mixer,
)
from vitzoo.layers.attention import check_heads
from vitzoo.layers.maps import padded_size
from vitzoo.models._registry import register_family
from vitzoo.models._trunk import Pyramid, PyramidConfig
from vitzoo.ops import attend2d, attend_routed
from vitzoo.patterns import everywhere

for _name in ("attend2d", "attend_in_regions", "crop_map", "pad_map"):
    torch.fx.wrap(_name)

LAYOUTS = ("biformer", "stl", "stl_nchw")


@dataclass(frozen=True)
class BiFormerConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        n_win: regions on a side of the map.
        topks: for each stage how many regions a region sees; None: attention among all tokens.
        layout: "biformer"; "stl" for the shell of Swin-T with the same attention, "stl_nchw" for its second version.
        drop_odd: stl: leave out rows and columns that do not fill a patch, as published, instead of padding them.
    """

    embed_dim: int | tuple[int, ...] = 64
    depths: tuple[int, ...] = (2, 2, 8, 2)
    num_heads: tuple[int, ...] = (2, 4, 8, 8)
    mlp_ratio: float | tuple[float, ...] = 3.0
    n_win: int = 7
    topks: tuple[int | None, ...] = (1, 4, 16, None)
    layout: str = "biformer"
    drop_odd: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, got '{self.layout}'.")
        if len(self.topks) != len(self.depths):
            raise ValueError(
                f"topks {self.topks} names {len(self.topks)} stages, depths {self.depths} {len(self.depths)}. "
                "Give one entry for each stage in both."
            )


def region_axis(n: int, n_win: int, late: bool) -> tuple[int, int]:
    """How many regions an axis of ``n`` tokens has, and of how many tokens each; the last ones may lie beyond the map.

    ``n_win`` regions. With ``late`` their size is rounded down, so that there may be more: up to twice as many less one, which
    is what a captured graph takes for all sizes; regions without any token are never chosen.
    """
    if not late:
        return n_win, (n + n_win - 1) // n_win
    size = padded_size(n, minimum=n_win) // n_win
    return (2 * n_win - 1 if torch.compiler.is_compiling() else max((n + size - 1) // size, n_win)), size


def region_means(x: Tensor, axes: tuple[tuple[int, int], ...], tokens: tuple[Tensor, ...]) -> Tensor:
    """Mean token of every region, ``[B, R, C]`` in fp32, from a padded map ``[B, H, W, N, D]`` whose padding is zero."""
    (rows, height), (cols, width) = axes
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = wide.reshape(x.shape[0], rows, height, cols, width, x.shape[3] * x.shape[4]).sum((2, 4))
    return (total / (tokens[0][:, None, None] * tokens[1][:, None]).clamp(min=1)).flatten(1, 2)


@torch.no_grad()
def route(q: Tensor, k: Tensor, axes: tuple[tuple[int, int], ...], size: tuple[int, int], topk: int) -> Tensor:
    """The ``topk`` regions that every region is most alike, section 3.2: ``[B, R, topk]``, the likest first.

    No gradient flows through the choice, as published. Regions that are equally alike come in their order.
    """
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        spans = [
            (n - torch.arange(count, device=q.device) * length).clamp(0, length)
            for (count, length), n in zip(axes, size, strict=True)
        ]
        likeness = region_means(q, axes, (spans[0], spans[1])) @ region_means(k, axes, (spans[0], spans[1])).transpose(1, 2)
        exists = (spans[0][:, None] * spans[1]).flatten() > 0
        return torch.where(exists, likeness, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :topk]


def attend_in_regions(qkv: Tensor, n_win: int, topk: int, late: bool) -> Tensor:
    """Bi-level routing attention, section 3.2, of packed q, k, v ``[B, H, W, 3, N, D]``: ``[B, H, W, N, D]``.

    Scores are scaled by one over the root of all heads' channels, as published.
    """
    height, width, heads, dim = qkv.shape[1], qkv.shape[2], qkv.shape[4], qkv.shape[5]
    axes = region_axis(height, n_win, late), region_axis(width, n_win, late)
    bottom, right = (count * size - n for (count, size), n in zip(axes, (height, width), strict=True))
    padded = qkv
    if torch.compiler.is_compiling() or bottom or right:
        padded = F.pad(qkv, (*(0, 0) * 3, 0, right, 0, bottom))
    q, k, v = padded.unbind(3)
    # a map that was shorter than n_win is full of regions of one token, zeros that may be chosen
    size = tuple(padded_size(n, minimum=n_win) for n in (height, width)) if late else (height, width)
    index = route(q, k, axes, (size[0], size[1]), topk)
    out = attend_routed(q, k, v, (axes[0][0], axes[1][0]), index, scale=(heads * dim) ** -0.5)
    return crop_map(out, qkv)


@register_mixer("routed")
class RoutedAttention(nn.Module):
    """Attention among the tokens of the regions most alike, and a depthwise 5x5 convolution of v.

    Args:
        slot: the place.
        n_win: regions on a side of the map.
        topk: how many of them a region sees.
        late: pad behind the projection, not before, and round the size of regions down (the op's second version).

    Raises:
        ValueError: more regions to see than there are.

    Shape: ``[B, H, W, C]``, unchanged, any H and W.
    """

    def __init__(self, slot: Slot, *, n_win: int = 7, topk: int = 4, late: bool = False) -> None:
        super().__init__()
        if not 1 <= topk <= n_win**2:
            raise ValueError(f"Of {n_win} x {n_win} regions a region sees 1 to {n_win**2}, not {topk}. Choose a smaller topk.")
        self.n_win, self.topk, self.late = n_win, topk, late
        self.multiple = (1, 1) if late else (n_win, n_win)
        self.split = (3, slot.num_heads, check_heads(slot.dim, slot.num_heads))
        self.qkv = Linear(slot.dim, 3 * slot.dim, bias=slot.qkv_bias)
        self.lepe = DepthwiseConv(slot.dim, 5)
        self.proj = Linear(slot.dim, slot.dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(pad_map(x, self.multiple)).unflatten(-1, self.split)
        out = attend_in_regions(qkv, self.n_win, self.topk, self.late).flatten(-2)
        return self.proj_drop(self.proj(crop_map(out + self.lepe(qkv.select(3, 2).flatten(-2)), x)))


class GlobalAttention(nn.Module):
    """Attention among all tokens, and a depthwise 5x5 convolution of its input or, with ``of_v``, of v.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, slot: Slot, of_v: bool) -> None:
        super().__init__()
        self.of_v = of_v
        self.split = (3, slot.num_heads, check_heads(slot.dim, slot.num_heads))
        self.qkv = Linear(slot.dim, 3 * slot.dim, bias=False)
        self.lepe = DepthwiseConv(slot.dim, 5)
        self.proj = Linear(slot.dim, slot.dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, self.split).unbind(3)
        near = self.lepe(v.flatten(-2) if self.of_v else x)
        return self.proj_drop(self.proj(attend2d(q, k, v, everywhere).flatten(-2) + near))


class PositionedBlock(Block):
    """A block behind a depthwise 3x3 convolution with a shortcut, which tells positions."""

    def __init__(self, dim: int, attn: nn.Module, **kwargs: Any) -> None:
        super().__init__(dim, attn, **kwargs)
        self.pos_embed = DepthwiseConv(dim)

    def forward(self, x: Tensor, *grid: int) -> Tensor:
        return super().forward(x + self.pos_embed(x), *grid)


class NormedPatches(PatchEmbed):
    """Patches with a batch norm: behind them (stl's stem), or of the map ``[B, H, W, C]`` that they are cut from."""

    def __init__(self, dim: int, patch_size: int, in_chans: int, *, pad: bool, first: bool) -> None:
        super().__init__(dim, patch_size, in_chans, pad=pad)
        self.first = first
        self.norm = BatchNorm(dim if first else in_chans)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return super().forward(x)
        x = pad_map(self.norm(x), self.multiple)
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BiFormer(Pyramid):
    """BiFormer on the pyramid trunk."""

    Config = BiFormerConfig

    cfg: BiFormerConfig

    def make_stem(self) -> nn.Module:
        cfg = self.cfg
        if cfg.layout == "biformer":
            return ConvNormStem(cfg.in_chans, cfg.dims[0] // 2, cfg.dims[0], bias=True)
        return NormedPatches(cfg.dims[0], 4, cfg.in_chans, pad=not cfg.drop_odd, first=True)

    def make_downsample(self, i: int) -> nn.Module:
        cfg = self.cfg
        if cfg.layout == "biformer":
            return ConvNorm(cfg.dims[i - 1], cfg.dims[i], 3, stride=2, bias=True)
        return NormedPatches(cfg.dims[i], 2, cfg.dims[i - 1], pad=not cfg.drop_odd, first=False)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        return (PositionedBlock if cfg.layout == "biformer" else Block)(
            cfg.dims[i],
            self.mixer(i, j, lambda: self.make_attention(i, j)),
            mlp=Mlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_eps=1e-6,
        )

    def make_attention(self, i: int, j: int) -> nn.Module:
        """The attention of block ``j`` of stage ``i``."""
        second, topk = self.cfg.layout == "stl_nchw", self.cfg.topks[i]
        if topk is None:
            return GlobalAttention(self.slot(i, j), of_v=second)
        return RoutedAttention(self.slot(i, j), n_win=self.cfg.n_win, topk=topk, late=second)

    def make_norm(self) -> nn.Module:
        return BatchNorm(self.num_features)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: BiFormerConfig) -> dict[str, Tensor]:
        """From rayleizhu/BiFormer: all three of its classes, and its dense backbones."""
        conv, norm = ("0", "1") if cfg.layout == "biformer" else ("1", "0")
        names = {conv: "conv" if cfg.layout == "biformer" else "proj", norm: "norm"}
        ours = {}
        for key, value in state.items():
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            if match := re.match(r"downsample_layers\.(\d)\.(\d)\.(.*)", key):
                i, place, rest = match.groups()
                if i != "0":
                    key = f"stages.{i}.downsample.{names[place]}.{rest}"
                elif cfg.layout == "biformer":
                    key = f"stem.conv{1 + int(place) // 3}.{('conv', 'norm')[int(place) % 3]}.{rest}"
                else:
                    key = f"stem.{('proj', 'norm')[int(place)]}.{rest}"
            ours[key] = value.flatten(1) if key.endswith(LINEAR) else value
        return ours


LINEAR = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
"""Our names of what the third class writes as a 1x1 convolution."""

PUBLISHED = (
    (r"^stages\.(\d)\.(?:blocks\.)?(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(wo|output_linear)\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^extra_norms\.", "feature_norms."),
    (r"^head\.(?!fc\.)", "head.fc."),
)

_DEEP: Any = {"depths": (4, 4, 18, 4), "drop_path_rate": 0.15}
_STL: Any = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 8), "mlp_ratio": 4.0, "drop_path_rate": 0.1}

VARIANTS = {
    "biformer_micro": BiFormerConfig(
        embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 2), mlp_ratio=2.0, n_win=2, topks=(1, 2, None), img_size=32
    ),
    "biformer_stl_micro": BiFormerConfig(
        embed_dim=16,
        depths=(1, 1, 1),
        num_heads=(1, 2, 2),
        mlp_ratio=2.0,
        n_win=2,
        topks=(1, 3, None),
        layout="stl_nchw",
        img_size=32,
    ),
    "biformer_tiny": BiFormerConfig(drop_path_rate=0.1),
    "biformer_small": BiFormerConfig(**_DEEP),
    "biformer_base": BiFormerConfig(**_DEEP, embed_dim=96, num_heads=(3, 6, 12, 8)),
    "biformer_stl": BiFormerConfig(**_STL, layout="stl"),
    "biformer_stl_nchw": BiFormerConfig(**_STL, layout="stl_nchw"),
}

for _first_conv, _is_stl in (("stem.conv1.conv", False), ("stem.proj", True)):
    _members = {name: cfg for name, cfg in VARIANTS.items() if (cfg.layout != "biformer") == _is_stl}
    register_family(__name__, BiFormer, _members, first_conv=_first_conv)
