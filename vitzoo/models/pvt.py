"""PVT and PVT v2. Wang et al. 2021, arXiv:2102.12122; Wang et al. 2022, arXiv:2106.13797.

New here: a transformer with the shape of a convolutional network, four stages of ever smaller and wider maps, that still
attends globally, because keys and values come from a reduced copy of the map. V2 lets patches overlap, sees neighbours
in its MLPs by a depthwise convolution and so needs no learned positions, and takes any image size.

Deviations:
- ``pvt_*`` is the host that FLatten and Agent attention are published with: no class token, no norm after the last stage,
  the classifier on the mean. The first PVT has both in its last stage, so the weights that its authors published (which
  timm does not have either) do not fit. ``pvt_v2_*`` is as published;
- V1 pads an odd map to an even one before the next patches, so that the strides hold. ``drop_odd`` drops its last row and
  column instead, which is what the published code does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.layers import (
    Block,
    ConvDownsample,
    DepthwiseMlp,
    Mlp,
    OverlapPatchEmbed,
    PatchEmbed,
    ReducedAttention,
    Slot,
    init_by_fan_out,
    resize_positions,
)
from vitzoo.models._contract import pair
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family

torch.fx.wrap("resize_positions")


@dataclass(frozen=True)
class PVTConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        embed_dim: channels of each stage.
        mlp_ratio: for each stage, hidden channels of the MLPs over their width.
        sr_ratios: for each stage, by what factor per axis the map of keys and values is reduced.
        version: 1 or 2.
        idle_norm: V1: hold the last norm of the published files that nothing passes through (FLatten's).
        drop_odd: V1: an odd map loses its last row and column before the next patches, instead of being padded.
    """

    embed_dim: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratio: tuple[float, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    version: int = 1
    idle_norm: bool = False
    drop_odd: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (1, 2):
            raise ValueError(f"version is 1 or 2, got {self.version}.")
        if len(self.sr_ratios) != len(self.depths):
            raise ValueError(
                f"sr_ratios {self.sr_ratios} names {len(self.sr_ratios)} stages, depths {self.depths} {len(self.depths)}. "
                "Give one number for each stage in both."
            )

    @property
    def map_sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage's map at ``img_size``."""
        sizes, size = [], pair(self.img_size or 224)
        for i in range(len(self.depths)):
            patch = 2 if i else 4
            size = (size[0] // patch, size[1] // patch) if self.drop_odd else (-(-size[0] // patch), -(-size[1] // patch))
            sizes.append(size)
        return tuple(sizes)


class PositionedPatches(PatchEmbed):
    """Patches, LayerNorm, and a learned position for each patch, resized bilinearly to the map at hand."""

    def __init__(self, dim: int, patch_size: int, in_chans: int, grid_size: tuple[int, int], pad: bool) -> None:
        super().__init__(dim, patch_size, in_chans, norm=True, pad=pad)
        self.grid_size = grid_size
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size[0] * grid_size[1], dim))

    def init_weights(self) -> None:
        """Truncated normal 0.02 for the positions."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor) -> Tensor:
        x = super().forward(image)
        return x + resize_positions(self.pos_embed, x, self.grid_size, mode="bilinear")

    @torch.no_grad()
    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Resize the positions to another map for good."""
        if grid_size != self.grid_size:
            like = self.pos_embed.new_empty(1, *grid_size, 0)
            resized = resize_positions(self.pos_embed, like, self.grid_size, mode="bilinear")
            self.pos_embed, self.grid_size = nn.Parameter(resized.flatten(1, 2)), grid_size


class PositionedDownsample(PositionedPatches):
    """The same from a channels-last map: ``[B, H, W, C]`` to ``[B, ceil(H / p), ceil(W / p), dim]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class IdleNorm(nn.LayerNorm):
    """The parameters of a norm that published files hold and published code never applies: the map passes unchanged.

    Their gradient is zero instead of none, which DDP and optimisers ask for.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.0 * (self.weight.sum() + self.bias.sum()) if torch.is_grad_enabled() else x


class PVT(Pyramid):
    """PVT V1 (without class token) or V2 on the pyramid trunk."""

    Config = PVTConfig
    NORM_EPS = 1e-6

    cfg: PVTConfig

    def make_stem(self) -> nn.Module:
        cfg = self.cfg
        if cfg.version == 2:
            return OverlapPatchEmbed(cfg.dims[0], 7, 4, cfg.in_chans)
        return PositionedPatches(cfg.dims[0], 4, cfg.in_chans, cfg.map_sizes[0], not cfg.drop_odd)

    def make_downsample(self, i: int) -> nn.Module:
        cfg = self.cfg
        if cfg.version == 2:
            return ConvDownsample(cfg.dims[i - 1], cfg.dims[i], bias=True)
        return PositionedDownsample(cfg.dims[i], 2, cfg.dims[i - 1], cfg.map_sizes[i], not cfg.drop_odd)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        dim = cfg.dims[i]
        kwargs: Any = {"qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        return Block(
            dim,
            self.mixer(i, j, lambda: ReducedAttention(dim, cfg.num_heads[i], cfg.sr_ratios[i], **kwargs)),
            mlp=(DepthwiseMlp if cfg.version == 2 else Mlp)(dim, cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_eps=self.NORM_EPS,
        )

    def slot(self, i: int, j: int) -> Slot:
        cfg = self.cfg
        return replace(super().slot(i, j), map_size=cfg.map_sizes[i], kv_ratio=cfg.sr_ratios[i], packed=False)

    def make_stage_norm(self, i: int) -> nn.Module | None:
        return nn.LayerNorm(self.cfg.dims[i], eps=self.NORM_EPS) if self.cfg.version == 2 else None

    def make_norm(self) -> nn.Module:
        return IdleNorm(self.num_features, eps=self.NORM_EPS) if self.cfg.idle_norm else nn.Identity()

    def init_weights(self) -> None:
        super().init_weights()
        if self.cfg.version == 2:
            init_by_fan_out(self)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None) -> None:
        """Record another image size and resize V1's positions to it for good. Every size can be fed without this."""
        super().set_input_size(img_size)
        if self.cfg.version == 1:
            for i, grid_size in enumerate(self.cfg.map_sizes):
                patches: Any = self.get_submodule(f"stages.{i}.downsample" if i else "stem")
                patches.set_grid_size(grid_size)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: PVTConfig) -> dict[str, Tensor]:
        """From whai362/PVT (V2), the PVT hosts of FLatten and Agent attention, and timm's PVT v2."""
        ours = {}
        for key, value in state.items():
            if key.startswith("norm.") and not cfg.idle_norm:
                continue  # nothing uses it
            key = re.sub(r"^(patch_embed|pos_embed|block|norm)(\d)", lambda m: f"stages.{int(m[2]) - 1}.{_PLACES[m[1]]}", key)
            key = re.sub(r"^stages\.0\.downsample|^patch_embed", "stem", key)
            key = re.sub(r"^head\.(?!fc\.)", "head.fc.", key)
            key = key.replace("mlp.dwconv.dwconv.", "mlp.dwconv.")
            key = key.replace("attn.norm.", "attn.sr.norm.").replace("attn.sr.weight", "attn.sr.proj.weight")
            key = key.replace("attn.sr.bias", "attn.sr.proj.bias")
            if cfg.version == 2:
                key = key.replace("downsample.proj.", "downsample.reduction.")
            ours[key] = value
        return ours


_PLACES = {"patch_embed": "downsample", "pos_embed": "downsample.pos_embed", "block": "blocks", "norm": "norm"}
"""What of a stage the published names, which count stages from 1, stand for."""


def _v2(
    depths: tuple[int, ...], embed_dim: tuple[int, ...] = (64, 128, 320, 512), drop_path_rate: float = 0.1, wide: int = 8
) -> PVTConfig:
    mlp_ratio = (wide, wide, 4, 4)
    return PVTConfig(version=2, embed_dim=embed_dim, depths=depths, mlp_ratio=mlp_ratio, drop_path_rate=drop_path_rate)


_MICRO: Any = {"embed_dim": (16, 32, 64), "depths": (2, 1, 1), "num_heads": (1, 2, 4), "sr_ratios": (4, 2, 1), "img_size": 32}

VARIANTS = {
    "pvt_micro": PVTConfig(**_MICRO, mlp_ratio=(2, 2, 2)),
    "pvt_tiny": PVTConfig(drop_path_rate=0.1),
    "pvt_small": PVTConfig(depths=(3, 4, 6, 3), drop_path_rate=0.1),
    "pvt_medium": PVTConfig(depths=(3, 4, 18, 3), drop_path_rate=0.3),
    "pvt_large": PVTConfig(depths=(3, 8, 27, 3), drop_path_rate=0.3),
    "pvt_v2_micro": PVTConfig(**_MICRO, mlp_ratio=(2, 2, 2), version=2),
    "pvt_v2_b0": _v2((2, 2, 2, 2), (32, 64, 160, 256)),
    "pvt_v2_b1": _v2((2, 2, 2, 2)),
    "pvt_v2_b2": _v2((3, 4, 6, 3)),
    "pvt_v2_b3": _v2((3, 4, 18, 3), drop_path_rate=0.3),
    "pvt_v2_b4": _v2((3, 8, 27, 3), drop_path_rate=0.3),
    "pvt_v2_b5": _v2((3, 6, 40, 3), drop_path_rate=0.3, wide=4),
}

register_family(__name__, PVT, VARIANTS, first_conv="stem.proj")
