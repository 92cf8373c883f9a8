"""SMT: scale-aware modulation, then attention. Lin et al. 2023, arXiv:2307.08579.

New here: where maps are large, depthwise convolutions of several sizes, each on its share of the channels, and a mixing of
their outputs compute by what every token is multiplied. Where they are small, tokens attend to each other. In the stage
between, blocks of both kinds alternate, as what matters moves from the neighbourhood to the whole picture.

Deviations: an odd map is padded to an even one before the second convolution of the stem, so that the strides hold.
``drop_odd`` drops its last row and column instead, which is what the published code does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitzoo.layers import (
    Block,
    ConvDownsample,
    ConvNorm,
    DepthwiseMlp,
    FullAttention,
    PatchEmbed,
    ScaleModulation,
    init_by_fan_out,
)
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family

MIXING = ("modulate", "alternate", "attend")


@dataclass(frozen=True)
class SMTConfig(PyramidConfig):
    """Adds to the pyramid's choices; ``num_heads`` is of attention, in stages of modulation for other mixers only.

    Attributes:
        mixing: what the blocks of each stage do: "modulate", "attend", or "alternate", which begins with modulation.
        scales: sizes of convolutions in a modulation.
        expand: channels between the two layers that mix them, over the width.
        stem_size: rows and columns of the first convolution's kernel.
        drop_odd: an odd map loses its last row and column in the stem, instead of being padded.
    """

    embed_dim: int | tuple[int, ...] = 64
    depths: tuple[int, ...] = (2, 2, 8, 1)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    mlp_ratio: float | tuple[float, ...] = (4, 4, 4, 2)
    mixing: tuple[str, ...] = ("modulate", "modulate", "alternate", "attend")
    scales: int = 4
    expand: int = 2
    stem_size: int = 3
    drop_odd: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mixing) != len(self.depths) or not set(self.mixing) <= set(MIXING):
            raise ValueError(
                f"mixing {self.mixing} does not fit {len(self.depths)} stages. Give each one of {', '.join(MIXING)}."
            )


class Stem(nn.Module):
    """A convolution of stride 2 with batch norm, a ReLU, patches of 2 x 2 with LayerNorm.

    Shape: ``[B, in_chans, H, W]`` to ``[B, ceil(H / 4), ceil(W / 4), dim]``; rounded down the second time without ``pad``.
    """

    def __init__(self, in_chans: int, dim: int, size: int, pad: bool) -> None:
        super().__init__()
        self.conv = ConvNorm(in_chans, dim, size, stride=2)
        self.act = nn.ReLU()
        self.patches = PatchEmbed(dim, 2, dim, norm=True, pad=pad)

    def forward(self, image: Tensor) -> Tensor:
        return self.patches(self.act(self.conv(image.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


class SMT(Pyramid):
    """SMT on the pyramid trunk."""

    Config = SMTConfig

    cfg: SMTConfig

    def make_stem(self) -> nn.Module:
        return Stem(self.cfg.in_chans, self.cfg.dims[0], self.cfg.stem_size, not self.cfg.drop_odd)

    def make_downsample(self, i: int) -> nn.Module:
        return ConvDownsample(self.cfg.dims[i - 1], self.cfg.dims[i], bias=True)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: self.make_mixer(i, j)),
            mlp=DepthwiseMlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate, residual=True),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_eps=1e-6,
        )

    def make_mixer(self, i: int, j: int) -> nn.Module:
        """The modulation or the attention of block ``j`` of stage ``i``."""
        cfg, mixing = self.cfg, self.cfg.mixing[i]
        if mixing == "attend" or (mixing == "alternate" and j % 2):
            drop = cfg.proj_drop_rate
            return FullAttention(cfg.dims[i], cfg.num_heads[i], packed=False, lepe=True, qkv_bias=cfg.qkv_bias, proj_drop=drop)
        return ScaleModulation(self.slot(i, j), scales=cfg.scales, expand=cfg.expand)

    def make_stage_norm(self, i: int) -> nn.Module:
        return nn.LayerNorm(self.cfg.dims[i], eps=1e-6)

    def make_norm(self) -> nn.Module:
        return nn.Identity()

    def init_weights(self) -> None:
        super().init_weights()
        init_by_fan_out(self)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: SMTConfig) -> dict[str, Tensor]:
        """From AFeng-x/SMT, classifiers and dense backbones."""
        del cfg
        ours = {}
        for key, value in state.items():
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            ours[key] = value.flatten(1) if key.endswith(".attn.modulate.weight") else value
        return ours


PLACES = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}
"""What of a stage the published names, which count stages from 1, stand for."""

PUBLISHED = (
    (r"^patch_embed1\.conv\.0\.", "stem.conv.conv."),
    (r"^patch_embed1\.conv\.1\.", "stem.conv.norm."),
    (r"^patch_embed1\.conv\.3\.", "stem.patches.proj."),
    (r"^patch_embed1\.norm\.", "stem.patches.norm."),
    (r"^(patch_embed|block|norm)(\d)\.", lambda m: f"stages.{int(m[2]) - 1}.{PLACES[m[1]]}."),
    (r"\.downsample\.proj\.", ".downsample.reduction."),
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"\.attn\.local_conv_(\d)\.", lambda m: f".attn.scales.{int(m[1]) - 1}."),
    (r"\.attn\.(local_conv|dw_conv)\.", ".attn.get_v."),
    (r"\.attn\.proj0\.", ".attn.mix.conv."),
    (r"\.attn\.bn\.", ".attn.mix.norm."),
    (r"\.attn\.proj1\.", ".attn.modulate."),
    (r"^head\.(?!fc\.)", "head.fc."),
)

_BASE: Any = {"depths": (4, 6, 28, 2), "mlp_ratio": (8, 6, 4, 2), "stem_size": 7, "drop_path_rate": 0.3}
_LARGE: Any = {
    **_BASE,
    "embed_dim": 96,
    "depths": (4, 6, 28, 4),
    "num_heads": (3, 6, 8, 16),
    "layer_scale": 1e-4,
    "drop_path_rate": 0.1,
}

VARIANTS = {
    "smt_micro": SMTConfig(
        embed_dim=16,
        depths=(1, 2, 1),
        num_heads=(1, 2, 4),
        mlp_ratio=2.0,
        mixing=("modulate", "alternate", "attend"),
        scales=2,
        img_size=32,
    ),
    "smt_tiny": SMTConfig(drop_path_rate=0.1),
    "smt_small": SMTConfig(depths=(3, 4, 18, 2), drop_path_rate=0.2),
    "smt_base": SMTConfig(**_BASE),
    "smt_large": SMTConfig(**_LARGE),
    "smt_large_384": SMTConfig(**_LARGE, img_size=384),
}

register_family(__name__, SMT, VARIANTS, first_conv="stem.conv.conv")
