"""MoH: mixture-of-head attention. Jin et al. 2024, arXiv:2410.11842, on TransNeXt, Shi 2023, arXiv:2311.17132.

New here: heads as experts. Some heads are shared by all tokens; of the others each token takes those that a router thinks
best for it, and weighs them. TransNeXt's attention, which has these heads, sees a token's neighbours and a pooled map in one
softmax, and its MLPs gate one half of their hidden map by the other.

In any other host the mixer ``mixture_of_heads`` has the same heads over plain attention:
``create_model("deit_tiny_patch16_224", mixer="mixture_of_heads")``. What routers learn beside the labels, to use all heads,
is in ``extra_loss``.

Deviations: any image size. Keys are counted, and pooled, at the size at hand; the published code does both for the one size
that it is built for, and there agrees. Heads that are not taken are computed and multiplied by 0, as in the published code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers import Block, ConvDownsample, DepthwiseConv, Linear, OverlapPatchEmbed, Slot, init_by_fan_out
from vitzoo.layers.aggregated import AggregatedAttention, LengthScaledAttention
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family


@dataclass(frozen=True)
class MoHConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        shared_heads: for each stage, heads that every token takes.
        routed_heads: for each stage, how many of its other heads a token takes; 0 where all are shared.
        pool_ratios: for each stage, by what its map is pooled for keys; 1: attention among all tokens instead.
        pretrain_size: image size that offsets are counted over.
    """

    embed_dim: int | tuple[int, ...] = 72
    depths: tuple[int, ...] = (5, 5, 22, 5)
    mlp_ratio: float | tuple[float, ...] = (8, 8, 4, 4)
    shared_heads: tuple[int, ...] = (3, 6, 3, 8)
    routed_heads: tuple[int, ...] = (0, 0, 6, 12)
    pool_ratios: tuple[int, ...] = (8, 4, 2, 1)
    pretrain_size: int = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shared_heads", "routed_heads", "pool_ratios"):
            value = getattr(self, name)
            if len(value) != len(self.depths):
                raise ValueError(f"{name} {value} names {len(value)} stages, depths {self.depths} {len(self.depths)}.")


class GatedMlp(nn.Module):
    """``fc2(gelu(dwconv(u)) * v)`` with ``u, v = fc1(x)``, two thirds of ``hidden`` channels each; section 3.4 of TransNeXt.

    Shape: ``[B, H, W, dim]``, unchanged.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        hidden = 2 * hidden // 3
        self.fc1 = Linear(dim, 2 * hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(F.gelu(self.dwconv(u)) * v)))


class MoH(Pyramid):
    """Mixture-of-head TransNeXt on the pyramid trunk."""

    Config = MoHConfig
    NO_DECAY: ClassVar[tuple[str, ...]] = (*Pyramid.NO_DECAY, "query_embedding", "near_bias", "cpb", "temperature")

    cfg: MoHConfig

    def make_stem(self) -> nn.Module:
        return OverlapPatchEmbed(self.cfg.dims[0], 7, 4, self.cfg.in_chans)

    def make_downsample(self, i: int) -> nn.Module:
        return ConvDownsample(self.cfg.dims[i - 1], self.cfg.dims[i], bias=True)

    def slot(self, i: int, j: int) -> Slot:
        return replace(super().slot(i, j), kv_ratio=self.cfg.pool_ratios[i])

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: self.make_attention(i, j)),
            mlp=GatedMlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_eps=1e-6,
        )

    def make_attention(self, i: int, j: int) -> nn.Module:
        """The attention of block ``j`` of stage ``i``, with its router."""
        cfg = self.cfg
        attention = AggregatedAttention if cfg.pool_ratios[i] > 1 else LengthScaledAttention
        reference = (cfg.pretrain_size // cfg.strides[i],) * 2
        return attention(self.slot(i, j), reference, cfg.shared_heads[i], cfg.routed_heads[i])

    def make_stage_norm(self, i: int) -> nn.Module:
        return nn.LayerNorm(self.cfg.dims[i], eps=1e-6)

    def make_norm(self) -> nn.Module:
        return nn.Identity()

    def init_weights(self) -> None:
        super().init_weights()
        init_by_fan_out(self)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: MoHConfig) -> dict[str, Tensor]:
        """From SkyworkAI/MoH, folder MoH-ViT."""
        del cfg
        ours = {}
        for key, value in state.items():
            if re.match(r"relative_(pos_index|coords_table)\d", key) or key.endswith((".seq_length_scale", ".padding_mask")):
                continue  # buffers, rebuilt in forward
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            ours[key] = value.flatten(1) if key.endswith(".attn.sr.weight") else value
        return ours


PLACES = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}
"""What of a stage the published names, which count stages from 1, stand for."""

ROUTERS = {"wg": "routed", "wg_0": "balance", "wg_1": "shared"}
"""Our names of the routers' layers."""

PUBLISHED = (
    (r"^patch_embed1\.", "stem."),
    (r"^(patch_embed|block|norm)(\d)\.", lambda m: f"stages.{int(m[2]) - 1}.{PLACES[m[1]]}."),
    (r"\.downsample\.proj\.", ".downsample.reduction."),
    (r"\.attn\.(wg(?:_\d)?)\.", lambda m: f".attn.router.{ROUTERS[m[1]]}."),
    (r"\.attn\.cpb_fc(\d)\.", lambda m: f".attn.cpb.{2 * int(m[1]) - 2}."),
    (r"\.attn\.relative_pos_bias_local$", ".attn.near_bias"),
    (r"\.attn\.learnable_tokens$", ".attn.near_keys"),
    (r"\.attn\.learnable_bias$", ".attn.near_weight"),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^head\.(?!fc\.)", "head.fc."),
)

_BASE: Any = {"embed_dim": 96, "depths": (5, 5, 23, 5), "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.6}

VARIANTS = {
    "moh_micro": MoHConfig(
        embed_dim=16,
        depths=(1, 1, 1),
        num_heads=(2, 4, 4),
        mlp_ratio=2.0,
        shared_heads=(2, 1, 0),
        routed_heads=(0, 2, 2),
        pool_ratios=(4, 2, 1),
        img_size=32,
        pretrain_size=32,
    ),
    "moh_transnext_small_80": MoHConfig(drop_path_rate=0.45),
    "moh_transnext_small_75": MoHConfig(shared_heads=(3, 6, 3, 4), drop_path_rate=0.45),
    "moh_transnext_base_75": MoHConfig(**_BASE, shared_heads=(4, 8, 4, 5), routed_heads=(0, 0, 8, 16)),
    "moh_transnext_base_50": MoHConfig(**_BASE, shared_heads=(2, 2, 2, 4), routed_heads=(2, 4, 6, 8)),
}

register_family(__name__, MoH, VARIANTS, first_conv="stem.proj")
