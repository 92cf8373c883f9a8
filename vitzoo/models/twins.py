"""Twins: PCPVT and SVT. Chu et al. 2021, arXiv:2104.13840. The implementation is timm's, with our attention.

New here: every second block of SVT attends inside windows (LSA), the others, and all of PCPVT, to keys that a strided
convolution has summed up (GSA); a depthwise convolution after the first block of a stage tells positions.

Deviations: none where timm runs. As published, patches are cut from the map as far as they go, so maps have
``floor(n / stride)`` rows, and windows are padded with zeros that take part as keys (the published dense backbone can mask
them instead; its mask is void on maps where only one side is padded).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.models import twins as timm_twins
from torch import Tensor, nn

from vitzoo.layers import WindowAttention, linear, takes_the_place_of
from vitzoo.models._adopted import Adopted, AdoptedConfig
from vitzoo.models._registry import register_family
from vitzoo.ops import attend
from vitzoo.patterns import window

for _name in ("attend", "linear"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class TwinsConfig(AdoptedConfig):
    """Adds to the choices of every adopted family.

    Attributes:
        patch_size: pixels on a side of a patch.
        embed_dims: channels of each stage.
        mlp_ratios: hidden channels of the MLPs over their width.
        sr_ratios: tokens on a side of the cells that keys are made of.
        wss: tokens on a side of a window in the even blocks of each stage (SVT); None for no windows (PCPVT).
        proj_drop_rate: dropout after projections and in MLPs.
    """

    patch_size: int = 4
    embed_dims: tuple[int, ...] = (64, 128, 256, 512)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    wss: tuple[int, ...] | None = None
    proj_drop_rate: float = 0.0

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(self.patch_size * 2**i for i in range(len(self.depths)))


@takes_the_place_of(timm_twins.LocallyGroupedAttn)
class LocalAttention(WindowAttention):
    """Attention inside windows (LSA), on tokens ``[B, h * w, C]`` of a map of ``size`` (h, w)."""

    def __init__(self, theirs: timm_twins.LocallyGroupedAttn) -> None:
        super().__init__(theirs, window(theirs.ws))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]  # as timm's block calls it
        return super().forward(x.view(x.shape[0], size[0], size[1], x.shape[2])).flatten(1, 2)


@takes_the_place_of(timm_twins.GlobalSubSampleAttn)
class SubsampledAttention(nn.Module):
    """Attention to the tokens of a smaller map (GSA), whose each token sums up a cell; tokens ``[B, h * w, C]``."""

    def __init__(self, theirs: timm_twins.GlobalSubSampleAttn) -> None:
        super().__init__()
        self.num_heads = theirs.num_heads
        self.q, self.kv, self.proj, self.proj_drop = theirs.q, theirs.kv, theirs.proj, theirs.proj_drop
        self.sr, self.norm = theirs.sr, theirs.norm

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q = linear(x, self.q.weight, self.q.bias).unflatten(-1, (self.num_heads, -1))
        if self.sr is not None:
            cells = x.view(x.shape[0], size[0], size[1], x.shape[2]).permute(0, 3, 1, 2)
            x = self.norm(self.sr(cells).flatten(2).transpose(1, 2))
        k, v = linear(x, self.kv.weight, self.kv.bias).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.proj_drop(linear(attend(q, k, v).flatten(-2), self.proj.weight, self.proj.bias))


@takes_the_place_of(timm_twins.PatchEmbed)
class Patches(nn.Module):
    """Patches with a norm: ``[B, C, H, W]`` to tokens ``[B, h * w, C']`` and the size (h, w) that they have."""

    def __init__(self, theirs: timm_twins.PatchEmbed) -> None:
        super().__init__()
        self.proj, self.norm = theirs.proj, theirs.norm

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class Twins(Adopted, timm_twins.Twins):
    """Twins-SVT, or Twins-PCPVT where there are no windows. Maps have ``floor(n / stride)`` rows."""

    Config = TwinsConfig
    STEM = r"^patch_embeds\.0\."
    BLOCKS = [
        (r"^patch_embeds\.([1-9]\d*)", (0,)),
        (r"^pos_block\.(\d+)", (0,)),
        (r"^blocks\.(\d+)\.(\d+)", None),
        (r"^norm\.|^head\.", (99999,)),
    ]
    NO_DECAY = ("pos_block",)

    cfg: TwinsConfig

    # parts that timm's class builds
    patch_embeds: Any
    pos_drops: Any
    blocks: Any
    pos_block: Any
    norm: Any
    head_drop: Any

    def embed(self, image: Tensor) -> Tensor:
        return image  # every stage begins with patches of its own

    @property
    def stages_left(self) -> int:
        return len(self.blocks)

    def run_stage(self, i: int, x: Tensor) -> Tensor:
        x, (height, width) = self.patch_embeds[i](x)
        x = self.pos_drops[i](x)
        for j, block in enumerate(self.blocks[i]):
            x = self.run_block(block, x, (height, width))
            if j == 0:
                x = self.pos_block[i](x, (height, width))
        return x.transpose(1, 2).view(x.shape[0], x.shape[2], height, width)

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x.mean(dim=(2, 3)) if self.global_pool == "avg" else x)
        return x if pre_logits else self.head(x)

    # the published layout is timm's, and timm's is ours


def _pcpvt(*depths: int) -> TwinsConfig:
    dims, heads, ratios = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4)
    return TwinsConfig(depths=depths, num_heads=heads, embed_dims=dims, mlp_ratios=ratios, drop_path_rate=0.1)


def _svt(dim: int, depths: tuple[int, ...], drop_path_rate: float = 0.1) -> TwinsConfig:
    return TwinsConfig(
        depths=depths,
        num_heads=tuple(dim // 32 * 2**i for i in range(4)),
        embed_dims=tuple(dim * 2**i for i in range(4)),
        wss=(7, 7, 7, 7),
        drop_path_rate=drop_path_rate,
    )


VARIANTS: dict[str, Any] = {
    "twins_micro": TwinsConfig(
        depths=(2, 2, 1),
        num_heads=(1, 2, 2),
        embed_dims=(32, 64, 64),
        mlp_ratios=(2, 2, 2),
        sr_ratios=(2, 1, 1),
        wss=(4, 4, 2),
        img_size=32,
    ),
    "twins_pcpvt_small": _pcpvt(3, 4, 6, 3),
    "twins_pcpvt_base": _pcpvt(3, 4, 18, 3),
    "twins_pcpvt_large": _pcpvt(3, 8, 27, 3),
    "twins_svt_small": _svt(64, (2, 2, 10, 4)),
    "twins_svt_base": _svt(96, (2, 2, 18, 2), 0.3),
    "twins_svt_large": _svt(128, (2, 2, 18, 2)),
}

register_family(__name__, Twins, VARIANTS, first_conv="patch_embeds.0.proj", classifier="head", borrow=True)
