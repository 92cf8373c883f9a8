"""DaViT: dual attention. Ding et al. 2022, arXiv:2204.03645. The implementation is timm's, with our attention.

New here: blocks of attention inside windows alternate with blocks in which the channels of a head attend to each other over
all tokens, so that every token hears of the whole image at linear cost.

Deviations: none where timm runs. The published code gives each half of a pair of blocks its own drop path rate, timm one
to both. Windows are padded with zeros that take part as keys, maps that a strided convolution halves to even size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import davit as timm_davit
from torch import Tensor, nn

from vitzoo.layers import takes_the_place_of
from vitzoo.layers.channels import GroupedChannelAttention
from vitzoo.layers.maps import pad_image
from vitzoo.layers.windows import plain_window
from vitzoo.models._adopted import Adopted, AdoptedConfig
from vitzoo.models._registry import register_family

torch.fx.wrap("pad_image")


@dataclass(frozen=True)
class DaViTConfig(AdoptedConfig):
    """Adds to the choices of every adopted family.

    Attributes:
        embed_dims: channels of each stage.
        window_size: tokens on a side of a window.
        mlp_ratio: hidden channels of the MLPs over their width.
        qkv_bias: bias in the projections to q, k, v.
        down_kernel_size: rows and columns of the convolutions that halve the map: 2, or 3 (overlapping).
    """

    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    window_size: int = 7
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    down_kernel_size: int = 2


@takes_the_place_of(timm_davit.SpatialBlock)
class SpatialBlock(nn.Module):
    """A block that attends inside windows, its positions told by depthwise convolutions; ``[B, C, H, W]``, unchanged."""

    def __init__(self, theirs: timm_davit.SpatialBlock) -> None:
        super().__init__()
        self.cpe1, self.norm1, self.drop_path1 = theirs.cpe1, theirs.norm1, theirs.drop_path1 or nn.Identity()
        self.attn: nn.Module = plain_window(theirs.attn, theirs.window_size)
        self.cpe2, self.norm2, self.mlp = theirs.cpe2, theirs.norm2, theirs.mlp
        self.drop_path2: Any = theirs.drop_path2 if theirs.mlp is not None else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x).permute(0, 2, 3, 1)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = self.cpe2(x.permute(0, 3, 1, 2))
        if self.mlp is None:
            return x
        x = x.permute(0, 2, 3, 1)
        return (x + self.drop_path2(self.mlp(self.norm2(x)))).permute(0, 3, 1, 2)


@takes_the_place_of(timm_davit.ChannelBlock)
class ChannelBlock(SpatialBlock):
    """The same with attention of channels to channels."""

    def __init__(self, theirs: timm_davit.ChannelBlock) -> None:
        nn.Module.__init__(self)
        self.cpe1, self.norm1, self.drop_path1 = theirs.cpe1, theirs.norm1, theirs.drop_path1
        self.attn = GroupedChannelAttention(theirs.attn, second=isinstance(theirs.attn, timm_davit.ChannelAttentionV2))
        self.cpe2, self.norm2, self.mlp = theirs.cpe2, theirs.norm2, theirs.mlp
        self.drop_path2 = theirs.drop_path2


@takes_the_place_of(timm_davit.Stem)
class Stem(nn.Module):
    """A strided convolution with a norm: ``[B, in_chans, H, W]`` to ``[B, C, ceil(H / 4), ceil(W / 4)]``."""

    def __init__(self, theirs: timm_davit.Stem) -> None:
        super().__init__()
        self.stride, self.conv, self.norm = theirs.stride, theirs.conv, theirs.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(pad_image(x, self.stride)))


@takes_the_place_of(timm_davit.Downsample)
class Downsample(nn.Module):
    """A norm and a convolution of stride 2: ``[B, C, H, W]`` to ``[B, C', ceil(H / 2), ceil(W / 2)]``."""

    def __init__(self, theirs: timm_davit.Downsample) -> None:
        super().__init__()
        self.norm, self.conv = theirs.norm, theirs.conv
        self.multiple = tuple(theirs.conv.kernel_size) if theirs.even_k else (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad_image(self.norm(x), self.multiple))


class DaViT(Adopted, timm_davit.DaVit):
    """DaViT, the map of its last stage pooled before it is normed."""

    Config = DaViTConfig
    BLOCKS = [
        (r"^stages\.(\d+)\.downsample", (0,)),
        (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        (r"^norm_pre|^head\.", (99999,)),
    ]

    cfg: DaViTConfig
    norm_pre: Any

    def embed(self, image: Tensor) -> Tensor:
        return self.stem(image)

    def run_stage(self, i: int, x: Tensor) -> Tensor:
        stage: Any = self.stages[i]
        x = stage.downsample(x)
        for block in stage.blocks:
            x = self.run_block(block, x)
        return x

    def final_norm(self, x: Tensor) -> Tensor:
        return self.norm_pre(x)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: Any) -> dict[str, Tensor]:
        """From the layout of dingmyu/davit; timm's is ours."""
        del cfg
        ours = {}
        for name, value in state.items():
            for pattern, replacement in PUBLISHED:
                name = re.sub(pattern, replacement, name)
            ours[name] = value
        return ours


# what the authors call something, and timm's name for it
PUBLISHED = (
    (r"^patch_embeds\.0\.", "stem."),
    (r"^patch_embeds\.(\d+)\.", r"stages.\1.downsample."),
    (r"^(stem|stages\.\d+\.downsample)\.proj\.", r"\1.conv."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _published(dim: int, pairs: int, **kwargs: Any) -> DaViTConfig:
    return DaViTConfig(
        depths=(1, 1, pairs, 1),
        num_heads=tuple(dim // 32 * 2**i for i in range(4)),
        embed_dims=tuple(dim * 2**i for i in range(4)),
        drop_path_rate=0.1,
        **kwargs,
    )


VARIANTS = {
    "davit_micro": DaViTConfig(
        depths=(1, 1, 1), num_heads=(1, 2, 4), embed_dims=(32, 64, 64), window_size=4, mlp_ratio=2.0, img_size=32
    ),
    "davit_tiny": _published(96, 3),
    "davit_small": _published(96, 9),
    "davit_base": _published(128, 9),
    "davit_large_w12_384": _published(192, 9, window_size=12, img_size=384),
}

register_family(__name__, DaViT, VARIANTS, first_conv="stem.conv", borrow=True, data={"crop_pct": 0.95})
