"""CrossFormer and CrossFormer++. Wang et al. 2022, arXiv:2108.00154; Wang et al. 2023, arXiv:2303.06908.

New here: tokens are read at several scales at once, by convolutions of several kernels side by side, and blocks attend in
turn to neighbours (windows) and to tokens a fixed interval apart (dilated windows). A position bias is computed from the
distance by a small MLP, so it has no size. ++ has groups that grow from stage to stage and, after every third block, a
depthwise convolution and a norm in the stream itself, which keep its amplitude.

Deviations from the published code: none in what is computed. A map whose shorter side is no longer than a group is one group,
as in the dense backbone, without the state that one keeps from call to call. Padded keys are left out instead of masked with
-1e6. Images and maps that do not divide are padded with zeros before the convolutions; the published code refuses them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.layers import Block, DepthwiseConv, GroupAttention, Mlp, pad_map
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family

torch.fx.wrap("pad_map")


@dataclass(frozen=True)
class CrossFormerConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        patch_sizes: kernels of the stem, in pixels; the first is its stride.
        merge_sizes: kernels between the stages, in tokens, for each place or once for all; the first is the stride, 2.
        group_size: for each stage the tokens on a side of a group.
        interval: for each stage how far apart the tokens of a group lie in every second block.
        acl: after every third block a depthwise convolution and a norm in the stream (the ++ models).
    """

    depths: tuple[int, ...] = (2, 2, 6, 2)
    patch_sizes: tuple[int, ...] = (4, 8, 16, 32)
    merge_sizes: tuple[tuple[int, ...], ...] = ((2, 4),)
    group_size: tuple[int, ...] = (7, 7, 7, 7)
    interval: tuple[int, ...] = (8, 4, 2, 1)
    acl: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("group_size", self.group_size), ("interval", self.interval)):
            if len(value) != len(self.depths):
                raise ValueError(
                    f"{name} {value} names {len(value)} stages, depths {self.depths} {len(self.depths)}. "
                    "Give one number for each stage in both."
                )
        if len(self.merge_sizes) not in (1, len(self.depths) - 1):
            raise ValueError(
                f"merge_sizes {self.merge_sizes} names {len(self.merge_sizes)} places between {len(self.depths)} stages. "
                "Give one tuple for each place, or one for all."
            )


class CrossScale(nn.Module):
    """Convolutions of several kernels and one stride side by side, section 3.1; the larger a kernel, the fewer its channels.

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / stride), ceil(W / stride), out_dim]``, the stride being the first kernel.
    """

    def __init__(self, dim: int, out_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        stride, last = kernels[0], len(kernels) - 1
        self.multiple = (stride, stride)
        self.projs = nn.ModuleList(
            nn.Conv2d(dim, out_dim // 2 ** min(i + 1, last), kernel, stride=stride, padding=(kernel - stride) // 2)
            for i, kernel in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, self.multiple).permute(0, 3, 1, 2)
        return torch.cat([proj(x) for proj in self.projs], dim=1).permute(0, 2, 3, 1)


class Stem(CrossScale):
    """The tokens of an image ``[B, in_chans, H, W]``, normed."""

    def __init__(self, dim: int, out_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__(dim, out_dim, kernels)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(super().forward(image.permute(0, 2, 3, 1)))


class Merging(CrossScale):
    """Half as many tokens a side, twice as wide; normed before."""

    def __init__(self, dim: int, out_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__(dim, out_dim, kernels)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class CoolingBlock(Block):
    """A block and the amplitude cooling layer behind it (++, section 3.4): it replaces the stream, with no residual."""

    def __init__(self, dim: int, attn: nn.Module, **kwargs: Any) -> None:
        super().__init__(dim, attn, **kwargs)
        self.ex_conv = DepthwiseConv(dim)
        self.ex_ln = nn.LayerNorm(dim)

    def forward(self, x: Tensor, *grid: int) -> Tensor:
        return self.ex_ln(self.ex_conv(super().forward(x, *grid)))


class CrossFormer(Pyramid):
    """CrossFormer on the pyramid trunk."""

    Config = CrossFormerConfig

    cfg: CrossFormerConfig

    def make_stem(self) -> nn.Module:
        return Stem(self.cfg.in_chans, self.cfg.dims[0], self.cfg.patch_sizes)

    def make_downsample(self, i: int) -> nn.Module:
        return Merging(self.cfg.dims[i - 1], self.cfg.dims[i], self.cfg.merge_sizes[min(i, len(self.cfg.merge_sizes)) - 1])

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        interval = cfg.interval[i] if j % 2 else 1
        kwargs: Any = {"qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        cooled = cfg.acl and j % 3 == 2 and j < cfg.depths[i] - 1
        return (CoolingBlock if cooled else Block)(
            cfg.dims[i],
            self.mixer(i, j, lambda: GroupAttention(cfg.dims[i], cfg.num_heads[i], cfg.group_size[i], interval, **kwargs)),
            mlp=Mlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
        )

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: CrossFormerConfig) -> dict[str, Tensor]:
        """From cheerss/CrossFormer, both branches, and its dense backbones."""
        del cfg
        ours = {}
        for key, value in state.items():
            if key.endswith((".biases", ".relative_position_index", ".attn_mask")):
                continue  # buffers of the first version, rebuilt in forward
            # published at the end of stage s, ours at the start of the next one
            key = re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key)
            key = key.replace("layers.", "stages.").replace(".reductions.", ".projs.").replace("patch_embed.", "stem.")
            ours[re.sub(r"^head\.(?!fc\.)", "head.fc.", key)] = value
        return ours


def _cross(embed_dim: int, depths: tuple[int, ...], drop_path_rate: float) -> CrossFormerConfig:
    heads = tuple(embed_dim // 32 * 2**i for i in range(4))
    return CrossFormerConfig(embed_dim=embed_dim, depths=depths, num_heads=heads, drop_path_rate=drop_path_rate)


def _cross_pp(embed_dim: int, depths: tuple[int, ...], drop_path_rate: float) -> CrossFormerConfig:
    return replace(_cross(embed_dim, depths, drop_path_rate), group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), acl=True)


VARIANTS = {
    "crossformer_micro": CrossFormerConfig(
        embed_dim=32,
        depths=(2, 1, 4),
        num_heads=(1, 2, 4),
        mlp_ratio=2.0,
        group_size=(3, 3, 2),
        interval=(2, 1, 2),
        patch_sizes=(4, 8),
        acl=True,
        img_size=32,
    ),
    "crossformer_tiny": _cross(64, (1, 1, 8, 6), 0.1),
    "crossformer_small": _cross(96, (2, 2, 6, 2), 0.2),
    "crossformer_base": _cross(96, (2, 2, 18, 2), 0.3),
    "crossformer_large": _cross(128, (2, 2, 18, 2), 0.5),
    "crossformer_pp_small": _cross_pp(64, (2, 2, 18, 2), 0.2),
    "crossformer_pp_base": _cross_pp(96, (2, 2, 18, 2), 0.3),
    "crossformer_pp_large": _cross_pp(128, (2, 2, 18, 2), 0.5),
    "crossformer_pp_huge": _cross_pp(128, (6, 6, 18, 2), 0.5),
}

register_family(__name__, CrossFormer, VARIANTS, first_conv="stem.projs.0")
