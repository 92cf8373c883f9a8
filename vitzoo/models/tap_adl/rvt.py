"""RVT, a robust vision transformer. Mao et al. 2022, arXiv:2105.07926.

New here: no learned positions and no class token, convolutions inside the MLPs, and, as ``plus``, scores multiplied by a
learned factor for each pair of places.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, NormMlpClassifierHead
from torch import Tensor, nn

from vitzoo.layers import Block, ConvNorm, PatchEmbed
from vitzoo.layers.batchnorm import affine, may_fold
from vitzoo.layers.maps import pad_image
from vitzoo.layers.tap import DiverseAttention
from vitzoo.models.tap_adl.robust import Robust, RobustConfig

for _name in ("pad_image", "resize_pairs"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class RVTConfig(RobustConfig):
    """Adds RVT's choices.

    Attributes:
        factor_blocks: how many of the first blocks have a factor for each pair of places (``plus``).
        factor_grid: rows and columns of the map that the factors are learned at.
        corner: of factors take the first rows and columns where a map has fewer tokens, instead of resizing them.
    """

    factor_blocks: int = 0
    factor_grid: tuple[int, int] = (14, 14)
    corner: bool = False


def resize_pairs(table: Tensor, grid: tuple[int, int], like: Tensor) -> Tensor:
    """One number for each pair of places of a map, ``[N, h * w, h * w]``, for the map ``like`` ``[B, H, W, C]``: bilinear."""
    size = (like.shape[1], like.shape[2])
    if not torch.compiler.is_compiling() and size == tuple(grid):
        return table
    for _ in range(2):  # keys, then queries
        table = F.interpolate(table.unflatten(-1, grid), size=size, mode="bilinear", align_corners=False)
        table = table.flatten(-2).transpose(-2, -1)
    return table


class FactorAttention(DiverseAttention):
    """Attention whose scores are multiplied by the sigmoid of a learned number for each head and pair of places.

    Section 3.2, "position-aware attention scaling". Args as those of ``DiverseAttention``, and:

    Args:
        *args: of the attention that it derives from.
        grid: rows and columns of the map that the numbers are learned at.
        corner: see ``RVTConfig``.
        **kwargs: likewise.
    """

    def __init__(self, *args: Any, grid: tuple[int, int], corner: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grid, self.corner = grid, corner
        self.att_mask = nn.Parameter(torch.empty(self.num_heads, grid[0] * grid[1], grid[0] * grid[1]))
        self.init_weights()

    def init_weights(self) -> None:
        """Normal 0.02, cut at one standard deviation, as published."""
        nn.init.trunc_normal_(self.att_mask, std=0.02, a=-0.02, b=0.02)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.corner:
            factors = self.att_mask[:, : q.shape[1] * q.shape[2], : q.shape[1] * q.shape[2]]
        else:
            factors = resize_pairs(self.att_mask, self.grid, q)
        return super().scores(q, k) * factors.sigmoid()

    def gather(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention = self.scores(q, k).softmax(dim=-1).to(v.dtype)
        # contiguous, so that a graph reshapes it to the map without questions about its sizes
        return (attention @ self.per_head(v).transpose(1, 2)).transpose(1, 2).contiguous()


class FoldedConv(ConvNorm):
    """A convolution and batch norm; in inference the norm is folded, without which an export is narrowed by its strides."""

    def forward(self, x: Tensor) -> Tensor:
        if not may_fold(x, [self.norm]):
            return super().forward(x)
        scale, shift = affine(self.norm)
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * scale + shift


class ConvMlp(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolutions, each with batch norm, GELUs between: ``[B, H, W, C]``, unchanged."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = FoldedConv(dim, hidden, 1, bias=True)
        self.dwconv = FoldedConv(hidden, hidden, groups=hidden, bias=True)
        self.fc2 = FoldedConv(hidden, dim, 1, bias=True)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(self.fc1(x)))
        return self.drop(self.fc2(F.gelu(self.dwconv(x))))


class Stem(nn.Module):
    """A 7x7 convolution of stride 2 with batch norm, max pooling, patches: an image to a map ``[B, h, w, dim]``.

    The image is padded to whole patches at the bottom and right; the convolution then loses no place of the map.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.multiple = (patch_size, patch_size)
        self.conv = nn.Conv2d(in_chans, 32, 7, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(32)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.patches = PatchEmbed(dim, patch_size // 4, 32)

    def forward(self, image: Tensor) -> Tensor:
        return self.patches(self.pool(self.norm(self.conv(pad_image(image, self.multiple)))))


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 in groups of one channel each: ``[B, H, W, C]`` to ``[B, ceil(H/2), ceil(W/2), n C]``."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RVT(Robust):
    """RVT on the pyramid trunk."""

    Config = RVTConfig

    cfg: RVTConfig

    def make_stem(self) -> nn.Module:
        return Stem(self.cfg.in_chans, self.cfg.dims[0], self.cfg.patch_size)

    def make_downsample(self, i: int) -> nn.Module:
        before, dim = self.cfg.dims[i - 1 : i + 1]
        return Downsample(before, dim) if self.cfg.goes_down(i) else nn.Identity()

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        block = Block(
            cfg.dims[i],
            self.mixer(i, j, partial(self.make_attention, i, j)),
            mlp=ConvMlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_eps=1e-6,
        )
        return self.pooled(i, block)

    def make_attention(self, i: int, j: int) -> nn.Module:
        """The attention of block ``j`` of stage ``i``, with factors in the first ``factor_blocks``."""
        cfg = self.cfg
        args, kwargs = (cfg.dims[i], cfg.num_heads[i]), {"qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        if sum(cfg.depths[:i]) + j < cfg.factor_blocks:
            return FactorAttention(*args, grid=cfg.factor_grid, corner=cfg.corner, **kwargs)
        return DiverseAttention(*args, **kwargs)

    def make_norm(self) -> nn.Module:
        return nn.Identity()  # the head has it, behind the pooling

    def make_head(self) -> nn.Module:
        cfg, norm = self.cfg, partial(LayerNorm2d, eps=1e-6)
        args = (self.num_features, cfg.num_classes)
        return NormMlpClassifierHead(*args, pool_type=cfg.global_pool, drop_rate=cfg.drop_rate, norm_layer=norm)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:  # its norm too: nothing trains it any more
            self.head.reset(0, "", reset_other=True)
        return take

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: RVTConfig) -> dict[str, Tensor]:
        """From guoyongcs/TAPADL, TAPADL_RVT."""
        starts = [i for i in range(len(cfg.depths)) if not i or cfg.goes_down(i)]  # of the published stages, one width each
        ours = {}
        for key, value in state.items():
            block = re.match(r"transformers\.(\d+)\.blocks\.(\d+)\.", key)
            if block:
                stage, index = cfg.place(int(block[2]), starts[int(block[1])])
                key = f"stages.{stage}.blocks.{index}.{key[block.end() :]}"
            pool = re.match(r"pools\.(\d+)\.", key)
            if pool:
                key = f"stages.{starts[int(pool[1]) + 1]}.downsample.{key[pool.end() :]}"
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            ours[key] = value
        return ours


NORMED = ("fc1", "dwconv", "fc2")
"""The convolutions of an MLP in the order in which the published names number their norms."""

PUBLISHED = (
    (r"^patch_embed\.proj\.0\.", "stem.conv."),
    (r"^patch_embed\.proj\.1\.", "stem.norm."),
    (r"^patch_embed\.proj\.3\.", "stem.patches.proj."),
    (r"\.mlp\.(fc1|dwconv|fc2)\.(?=weight|bias)", r".mlp.\1.conv."),
    (r"\.mlp\.bn(\d)\.", lambda m: f".mlp.{NORMED[int(m[1]) - 1]}.norm."),
    (r"\.dilation_predictor\.", ".norm1.predictor."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
