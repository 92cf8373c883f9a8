"""GC ViT: global context vision transformer. Hatamizadeh et al. 2023, arXiv:2206.09959. timm's, with our attention.

New here: blocks of attention inside windows alternate with blocks in which all windows are asked the same thing: a query
that convolutions and pooling make of the whole map, as large as one window.

Deviations from the published code, which takes square images of one size:
- any image size. Maps are padded after the norm, before the projection, and padded tokens take part as keys; the query is
  resized to the window (bicubic, as in the published dense backbone). At the published size neither happens;
- the window is chosen (``window_size``), not derived from ``img_size``;
- the merging stands at the start of a stage (timm's layout), and squeeze and excite has the published width at any number
  of channels, where timm's is a multiple of 8. At every published width both agree.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite
from timm.models import gcvit as timm_gcvit
from torch import Tensor, nn

from vitzoo.layers import QueriedBlock, takes_the_place_of
from vitzoo.models._adopted import Adopted, AdoptedConfig
from vitzoo.models._registry import register_family


@dataclass(frozen=True)
class GCViTConfig(AdoptedConfig):
    """Adds to the choices of every adopted family.

    Attributes:
        embed_dim: channels of the first stage; each next one has twice as many.
        window_size: tokens on a side of a window, one number per stage.
        mlp_ratio: hidden channels of the MLPs over their width.
        qkv_bias: bias in the projections to q, k, v.
        layer_scale: initial value of the learned scale on both branches of a block; None for none.
        proj_drop_rate: dropout after projections and in MLPs.
    """

    embed_dim: int = 64
    window_size: tuple[int, ...] = (7, 7, 14, 7)
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    layer_scale: float | None = None
    proj_drop_rate: float = 0.0

    def arguments(self) -> dict[str, Any]:
        # how often a query is pooled follows from the image that windows of the first stage divide in eight, as published
        return {**super().arguments(), "img_size": 32 * self.window_size[0]}


takes_the_place_of(timm_gcvit.GlobalContextVitBlock)(QueriedBlock)


@takes_the_place_of(timm_gcvit.GlobalContextVitStage)
class ContextStage(nn.Module):
    """Merging, the query for all windows, blocks; ``[B, C, H, W]`` to ``[B, C', H', W']``, normed in the last stage."""

    def __init__(self, theirs: timm_gcvit.GlobalContextVitStage) -> None:
        super().__init__()
        self.grad_checkpointing = theirs.grad_checkpointing
        self.downsample, self.global_block, self.global_norm = theirs.downsample, theirs.global_block, theirs.global_norm
        self.blocks, self.norm, self.dim = theirs.blocks, theirs.norm, theirs.dim
        self.size = tuple(theirs.blocks[0].window_size)

    def query(self, x: Tensor) -> Tensor:
        """What all windows of the map ``[B, C, H, W]`` are asked: ``[B, h, w, C]``, as large as one of them."""
        pooled = F.interpolate(self.global_block(x), size=self.size, mode="bicubic", align_corners=False)
        return self.global_norm(pooled.permute(0, 2, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        query, x = self.query(x), x.permute(0, 2, 3, 1)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = timm_gcvit.checkpoint(block, x, query)
            else:
                x = block(x, query)
        return self.norm(x).permute(0, 3, 1, 2).contiguous()


class GCViT(Adopted, timm_gcvit.GlobalContextVit):
    """GC ViT; the features of its last stage are not normed, as those of the others."""

    Config = GCViTConfig
    BLOCKS = [
        (r"^stages\.(\d+)\.(?:downsample|global_block|global_norm)", (0,)),
        (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        (r"^stages\.\d+\.norm|^head\.", (99999,)),
    ]
    NO_DECAY = ("rel_pos",)

    cfg: GCViTConfig

    def __init__(self, cfg: GCViTConfig | None = None, **overrides: Any) -> None:
        super().__init__(cfg, **overrides)
        for block in (m for m in self.modules() if isinstance(m, timm_gcvit.MbConvBlock)):
            dim = block.conv_pw.in_channels
            if block.se.fc1.out_channels != dim // 4:
                block.se = SqueezeExcite(dim, rd_channels=dim // 4, act_layer=nn.GELU, bias=False)

    def embed(self, image: Tensor) -> Tensor:
        return self.stem(image)

    def run_stage(self, i: int, x: Tensor) -> Tensor:
        stage: Any = self.stages[i]
        x = self.run_block(stage.downsample, x)
        query, x = self.run_block(stage.query, x), x.permute(0, 2, 3, 1)
        for block in stage.blocks:
            x = self.run_block(block, x, query)
        return x.permute(0, 3, 1, 2)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's, which leaves the norm of the last stage."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_norm:
            self.stages[-1].norm = nn.Identity()
        return take

    def final_norm(self, x: Tensor) -> Tensor:
        norm = self.stages[-1].norm  # an Identity in every other stage, and where it was pruned
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: GCViTConfig) -> dict[str, Tensor]:
        """From the layout of NVlabs/GCVit; timm's is ours."""
        ours = {}
        for name, value in state.items():
            if name.endswith("relative_position_index"):
                continue
            name = re.sub(r"^norm\.", f"stages.{len(cfg.depths) - 1}.norm.", name)
            name = re.sub(r"^levels\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", name)
            name = re.sub(r"q_global_gen\.to_q_global\.(\d+)\.", lambda m: f"global_block.blocks.conv{int(m[1]) + 1}.", name)
            for pattern, replacement in PUBLISHED:
                name = re.sub(pattern, replacement, name)
            # the layers of squeeze and excite are linear there, convolutions here
            ours[name] = value[:, :, None, None] if ".se.fc" in name and value.ndim == 2 else value
        return ours


# what the authors call something, and timm's name for it
PUBLISHED = (
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.", "stem.down."),
    (r"^levels\.", "stages."),
    (r"\.conv\.0\.", ".conv_block.conv_dw."),
    (r"\.conv\.2\.fc\.0\.", ".conv_block.se.fc1."),
    (r"\.conv\.2\.fc\.2\.", ".conv_block.se.fc2."),
    (r"\.conv\.3\.", ".conv_block.conv_pw."),
    (r"\.blocks\.(conv\d+)\.conv_block\.", r".blocks.\1."),
    (r"\.attn\.relative_position_bias_table$", ".attn.rel_pos.relative_position_bias_table"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _published(depths: tuple[int, ...], drop_path_rate: float, dim: int = 64, w: int = 7, **kwargs: Any) -> GCViTConfig:
    return GCViTConfig(
        window_size=(w, w, 2 * w, w),
        img_size=32 * w,
        depths=depths,
        num_heads=tuple(dim // 32 * 2**i for i in range(4)),
        embed_dim=dim,
        drop_path_rate=drop_path_rate,
        layer_scale=None if dim == 64 else 1e-5,
        **kwargs,
    )


VARIANTS = {
    "gcvit_micro": GCViTConfig(
        depths=(2, 2, 2), num_heads=(1, 2, 2), embed_dim=16, window_size=(2, 2, 4), mlp_ratio=2.0, img_size=64, layer_scale=1.0
    ),
    "gcvit_xxtiny": _published((2, 2, 6, 2), 0.2),
    "gcvit_xtiny": _published((3, 4, 6, 5), 0.2),
    "gcvit_tiny": _published((3, 4, 19, 5), 0.2),
    "gcvit_tiny2": _published((3, 4, 29, 5), 0.25),
    "gcvit_small": _published((3, 4, 19, 5), 0.3, 96, mlp_ratio=2.0),
    "gcvit_small2": _published((3, 4, 23, 5), 0.35, 96),
    "gcvit_base": _published((3, 4, 19, 5), 0.5, 128, mlp_ratio=2.0),
    "gcvit_large": _published((3, 4, 19, 5), 0.5, 192, mlp_ratio=2.0),
    "gcvit_large_384": _published((3, 4, 19, 5), 0.1, 192, 12, mlp_ratio=2.0),
    "gcvit_large_512": _published((3, 4, 19, 5), 0.1, 192, 16, mlp_ratio=2.0),
}

register_family(__name__, GCViT, VARIANTS, first_conv="stem.conv1", borrow=True, data={"crop_pct": 0.875})
