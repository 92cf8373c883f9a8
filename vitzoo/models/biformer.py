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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.layers import (
    BatchNorm,
    Block,
    ConvNorm,
    ConvNormStem,
    DepthwiseConv,
    Linear,
    Mlp,
    NormedPatches,
    PositionedBlock,
    RoutedAttention,
    Slot,
)
from vitzoo.layers.attention import check_heads
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family
from vitzoo.ops import attend2d
from vitzoo.patterns import everywhere

torch.fx.wrap("attend2d")

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


class BiFormer(Pyramid):
    """BiFormer on the pyramid trunk."""

    Config = BiFormerConfig

    cfg: BiFormerConfig

    def make_stem(self) -> nn.Module:
        cfg = self.cfg
        if cfg.layout == "biformer":
            return ConvNormStem(cfg.in_chans, cfg.dims[0] // 2, cfg.dims[0], bias=True)
        return NormedPatches(cfg.in_chans, cfg.dims[0], 4, pad=not cfg.drop_odd, stem=True)

    def make_downsample(self, i: int) -> nn.Module:
        cfg = self.cfg
        if cfg.layout == "biformer":
            return ConvNorm(cfg.dims[i - 1], cfg.dims[i], 3, stride=2, bias=True)
        return NormedPatches(cfg.dims[i - 1], cfg.dims[i], 2, pad=not cfg.drop_odd)

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
