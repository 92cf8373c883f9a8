"""DAT and DAT++. Xia et al. 2022, arXiv:2201.00520; Xia et al. 2023, arXiv:2309.01430.

New here: attention to a few samples of the map, read at points that the image itself decides on, so that a layer sees the
whole map at the cost of a window and its keys gather where the objects are. The layer is ``layers.DeformableAttention``;
the published models alternate it with windows (DAT) or neighborhoods (DAT++), and their other block kinds are here too.

Deviations from the published code:
- any image size in both versions. Bias tables are read in units of the map, as version 2 does, where version 1 runs at the
  size it was built for alone; patches and cells of an odd map are padded, where version 1 drops what is left; windows pad as
  in the published dense backbone, and one that covers an axis is not shifted there;
- logits only. The sampling points are ``DeformableAttention.points`` of a block's normed input;
- no parameters that nothing depends on: the offset network of a pooling block, the layer scales of an X block, the fixed
  shifts of an E block (the two biases of its shifts are one). Blocks of kind Q, which shrink the map, are left out;
- neighborhood bias tables take no weight decay, like all others.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vitzoo.layers import (
    Block,
    ConvDownsample,
    DeformableAttention,
    DepthwiseConv,
    DepthwiseMlp,
    Linear,
    Mlp,
    OverlapPatchEmbed,
    PatchEmbed,
    PatternAttention,
    ReducedAttention,
    SlideAttention,
    pad_map,
)
from vitzoo.models._contract import pair
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family
from vitzoo.patterns import neighborhood, window

torch.fx.wrap("pad_map")

KINDS = {
    "L": "windows",
    "S": "windows shifted by half, rounded up",
    "D": "deformable attention",
    "N": "neighborhoods",
    "X": "a large depthwise convolution (ConvNeXt)",
    "P": "attention to a reduced map (PVT)",
    "E": "a 3 x 3 neighborhood of learned shifts (slide attention)",
}


@dataclass(frozen=True)
class DATConfig(PyramidConfig):
    """Adds to the pyramid's choices. What says "of each stage" is one value for all stages or a tuple with one for each.

    Attributes:
        version: 1 for DAT's arithmetic in deformable attention and convolutional MLPs, 2 for DAT++'s.
        blocks: for each stage the kinds of its blocks, letters of ``KINDS``; a shorter string repeats.
        conv_patches: overlapping convolutions instead of patches, in the stem and between stages.
        stem_dim: channels of the stem; None for those of the first stage.
        conv_mlp: of each stage: a depthwise convolution in the MLPs.
        lpu: of each stage: add a depthwise convolution to the map before each block.
        layer_scales: of each stage, instead of ``layer_scale``.
        window_size: of each stage: tokens on a side of a window (L, S) or of the kernel (X).
        kernel_size: of each stage: tokens on a side of a neighborhood (N).
        groups: of each stage: groups of channels with points of their own (D).
        sample_strides: of each stage: tokens per sample, on each axis (D).
        offset_kernels: of each stage: kernel of the network that places the samples (D).
        offset_range: of each stage: how far samples move, in samples; negative: without limit (D).
        bias: of each stage: "table", "mlp", "fixed", "conv" or "none" (D).
        pooled: of each stage: averages instead of samples, without bias (D).
        sr_ratios: of each stage: by what factor per axis the map of keys and values is reduced (P).
        table_img_size: image size that the bias tables are for, where it is not ``img_size``.
    """

    embed_dim: int = 64
    depths: tuple[int, ...] = (2, 4, 18, 2)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    version: int = 2
    blocks: tuple[str, ...] = ("ND", "ND", "ND", "DD")
    conv_patches: bool = True
    stem_dim: int | None = None
    conv_mlp: bool | tuple[bool, ...] = True
    lpu: bool | tuple[bool, ...] = True
    layer_scales: tuple[float | None, ...] = ()
    window_size: int | tuple[int, ...] = 7
    kernel_size: int | tuple[int, ...] = 7
    groups: int | tuple[int, ...] = (1, 2, 4, 8)
    sample_strides: int | tuple[int, ...] = (8, 4, 2, 1)
    offset_kernels: int | tuple[int, ...] = (9, 7, 5, 3)
    offset_range: float | tuple[float, ...] = -1.0
    bias: str | tuple[str, ...] = "table"
    pooled: bool | tuple[bool, ...] = False
    sr_ratios: int | tuple[int, ...] = 1
    table_img_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (1, 2):
            raise ValueError(f"version is 1 or 2, got {self.version}.")
        stages = len(self.depths)
        for name, value in vars(self).items():
            if name in _OF_EACH_STAGE and isinstance(value, tuple) and value and len(value) != stages:
                raise ValueError(f"{name} {value} names {len(value)} stages, depths {self.depths} {stages}.")
        for kinds in self.blocks:
            for kind in kinds:
                if kind not in KINDS:
                    raise ValueError(f"There is no block kind '{kind}'. Kinds: {', '.join(KINDS)}.")

    def at(self, name: str, i: int) -> Any:
        """The value of a field at stage ``i``."""
        value = getattr(self, name)
        return value[i] if isinstance(value, tuple) else value

    def kind(self, i: int, j: int) -> str:
        """The kind of block ``j`` of stage ``i``."""
        return self.blocks[i][j % len(self.blocks[i])]


_OF_EACH_STAGE = (
    *("blocks", "conv_mlp", "lpu", "layer_scales", "window_size", "kernel_size", "groups", "sample_strides"),
    *("offset_kernels", "offset_range", "bias", "pooled", "sr_ratios"),
)


# -- the stem and what stands between stages ------------------------------------------------------------------------


class DoubleConvStem(nn.Module):
    """Two overlapping 3x3 convolutions of stride 2, each with LayerNorm, a GELU between.

    Shape: ``[B, in_chans, H, W]`` to ``[B, ceil(H / 4), ceil(W / 4), dim]``.
    """

    def __init__(self, dim: int, in_chans: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(dim // 2)
        self.act = nn.GELU()
        self.proj2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        x = self.act(self.norm1(self.proj(image).permute(0, 2, 3, 1)))
        return self.norm(self.proj2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchDownsample(nn.Module):
    """Cells of 2 x 2 tokens through a convolution without bias, then LayerNorm; odd maps get a row or column of zeros.

    Shape: ``[B, H, W, dim]`` to ``[B, ceil(H / 2), ceil(W / 2), out_dim]``.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 2, stride=2, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(pad_map(x, (2, 2)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


# -- blocks ---------------------------------------------------------------------------------------------------------


class DATBlock(Block):
    """A block with a local perception unit, a depthwise convolution that is added to the map, before it."""

    def __init__(self, dim: int, attn: nn.Module, *, lpu: bool, **kwargs: Any) -> None:
        super().__init__(dim, attn, **kwargs)
        self.lpu = DepthwiseConv(dim) if lpu else None

    def forward(self, x: Tensor, *grid: int) -> Tensor:
        return super().forward(x if self.lpu is None else x + self.lpu(x), *grid)


class ConvBlock(nn.Module):
    """``x + drop_path(mlp(norm(conv(x))))`` with a large depthwise convolution (X, from ConvNeXt).

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, dim: int, size: int, *, lpu: bool, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.lpu = DepthwiseConv(dim) if lpu else None
        self.conv = DepthwiseConv(dim, size)
        self.norm = nn.LayerNorm(dim)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.lpu is None else x + self.lpu(x)
        return x + self.drop_path(self.mlp(self.norm(self.conv(x))))


class DAT(Pyramid):
    """DAT, DAT+ or DAT++ on the pyramid trunk."""

    Config = DATConfig

    cfg: DATConfig

    def make_stem(self) -> nn.Module:
        cfg = self.cfg
        dim = cfg.stem_dim or cfg.dims[0]
        if not cfg.conv_patches:
            stem: nn.Module = PatchEmbed(dim, 4, cfg.in_chans, norm=True)
        else:
            stem = DoubleConvStem(dim, cfg.in_chans) if cfg.version == 2 else OverlapPatchEmbed(dim, 7, 4, cfg.in_chans)
        if dim == cfg.dims[0]:
            return stem
        return nn.Sequential(OrderedDict(embed=stem, project=Linear(dim, cfg.dims[0])))

    def make_downsample(self, i: int) -> nn.Module:
        return (ConvDownsample if self.cfg.conv_patches else PatchDownsample)(self.cfg.dims[i - 1], self.cfg.dims[i])

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        dim, hidden = cfg.dims[i], cfg.mlp_dim(i)
        mlp = (
            DepthwiseMlp(dim, hidden, cfg.proj_drop_rate, residual=cfg.version == 2)
            if cfg.at("conv_mlp", i)
            else Mlp(dim, hidden, cfg.proj_drop_rate)
        )
        if cfg.kind(i, j) == "X" and cfg.mixer_of(i, j) is None:
            return ConvBlock(dim, cfg.at("window_size", i), lpu=cfg.at("lpu", i), mlp=mlp, drop_path=drop_path)
        return DATBlock(
            dim,
            self.mixer(i, j, lambda: self.make_attention(i, j)),
            lpu=cfg.at("lpu", i),
            mlp=mlp,
            drop_path=drop_path,
            layer_scale=cfg.layer_scales[i] if cfg.layer_scales else cfg.layer_scale,
        )

    def make_attention(self, i: int, j: int) -> nn.Module:
        """The attention of block ``j`` of stage ``i``, by its kind."""
        cfg, kind = self.cfg, self.cfg.kind(i, j)
        dim, heads, drop = cfg.dims[i], cfg.num_heads[i], cfg.proj_drop_rate
        if kind == "D":
            return self.make_deformable(i)
        if kind == "P":
            return ReducedAttention(dim, heads, cfg.at("sr_ratios", i), proj_drop=drop)
        if kind == "E":
            return SlideAttention(self.slot(i, j))
        if kind == "N":
            size = cfg.at("kernel_size", i)
            return PatternAttention(
                dim, heads, neighborhood(size), pad_minimum=(size, size), qkv_bias=cfg.qkv_bias, proj_drop=drop
            )
        size = cfg.at("window_size", i)
        shift = -(-size // 2) if kind == "S" else 0  # 4 of 7, where Swin has 3
        windows = window(size, shift=shift, edge="cover")
        attn = PatternAttention(dim, heads, windows, pad_multiple=(size, size), qkv_bias=cfg.qkv_bias, proj_drop=drop)
        nn.init.trunc_normal_(attn.rel_bias, std=0.01)
        return attn

    def make_deformable(self, i: int) -> DeformableAttention:
        """Deformable attention in stage ``i``."""
        cfg = self.cfg
        height, width = pair(cfg.table_img_size or cfg.img_size or 224)
        stride = cfg.strides[i]
        return DeformableAttention(
            cfg.dims[i],
            cfg.num_heads[i],
            (-(-height // stride), -(-width // stride)),
            groups=cfg.at("groups", i),
            stride=cfg.at("sample_strides", i),
            kernel_size=cfg.at("offset_kernels", i),
            offset_range=cfg.at("offset_range", i),
            bias="none" if cfg.at("pooled", i) else cfg.at("bias", i),
            pooled=cfg.at("pooled", i),
            version=cfg.version,
            qkv_bias=cfg.qkv_bias,
            proj_drop=cfg.proj_drop_rate,
        )

    def init_weights(self) -> None:
        """Nothing: PyTorch's own initial values, which the published models begin from (their reset finds no layer)."""

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: DATConfig) -> dict[str, Tensor]:
        """From LeapLabTHU/DAT, both versions, and its dense-prediction backbones."""
        ours: dict[str, Tensor] = {}
        for key, value in state.items():
            head, *rest = key.split(".")
            if head == "patch_proj":
                projected = cfg.stem_dim not in (None, cfg.dims[0])
                names = _STEM if cfg.version == 2 and cfg.conv_patches else _PATCH_STEM
                key = ".".join(["stem.embed" if projected else "stem", names.get(rest[0], rest[0]), rest[-1]])
            elif head == "down_projs":
                key = f"stages.{int(rest[0]) + 1}.downsample.{'reduction' if rest[1] == '0' else 'norm'}.{rest[-1]}"
            elif head in ("cls_norm", "cls_head"):
                key = f"{'norm' if head == 'cls_norm' else 'head.fc'}.{rest[-1]}"
            elif head == "norms":
                key = f"feature_norms.{rest[0]}.{rest[-1]}"
            elif head == "stages":
                i, part, *tail = rest
                if part == "proj":
                    key, value = f"stem.project.{tail[-1]}", _as_linear(value)
                elif part in _PARTS and int(i) < len(cfg.blocks):
                    found = _in_block(cfg, int(i), part, tail, value)
                    if found is None:
                        continue
                    name, value = found
                    key = f"stages.{i}.blocks.{name}"
            ours[key] = ours[key] + value if key in ours else value  # the two biases of a slide attention's shifts
        return ours


# -- published names ------------------------------------------------------------------------------------------------

_STEM = {"0": "proj", "1": "norm1", "3": "proj2", "4": "norm"}
_PATCH_STEM = {"0": "proj", "1": "norm"}
_PARTS = ("attns", "layer_norms", "layer_scales", "ln_cnvnxt", "local_perception_units", "mlps")
_MLP = {"linear1": "fc1", "linear2": "fc2", "dwc": "dwconv"}
_ATTENTION = {
    "proj_qkv": "qkv",
    "proj_out": "proj",
    "proj_q": "q",
    "proj_k": "k",
    "proj_v": "v",
    "rpb": "rel_bias",
    "conv_offset.0": "offset.conv",
    "conv_offset.1.norm": "offset.norm",
    "conv_offset.3": "offset.proj",
    "proj_ds.0": "sr.proj",
    "proj_ds.1.norm": "sr.norm",
    "dep_conv": "shift",
    "dep_conv1": "shift",
}
_BUFFERS = ("relative_position_index", "attn_mask", "q_grid", "reference")  # rebuilt in forward


def _as_linear(weight: Tensor) -> Tensor:
    """The weight of a 1x1 convolution as that of a linear layer; anything else as it is."""
    return weight.flatten(1) if weight.ndim == 4 and weight.shape[2:] == (1, 1) else weight


def _in_block(cfg: DATConfig, i: int, part: str, tail: list[str], value: Tensor) -> tuple[str, Tensor] | None:
    """Our name below ``stages.{i}.blocks`` and our shape of an entry of stage ``i``; None for what we do not keep."""
    number = int(tail[0])
    if part in ("layer_norms", "layer_scales"):  # two for each block
        block, branch = divmod(number, 2)
        if cfg.kind(i, block) == "X":
            return None
        name = f"norm{branch + 1}.{tail[-1]}" if part == "layer_norms" else f"ls{branch + 1}.gamma"
        return f"{block}.{name}", value
    if part == "ln_cnvnxt":
        return f"{number}.norm.{tail[-1]}", value
    if part == "local_perception_units":
        return f"{number}.lpu.{tail[-1]}", value
    if part == "mlps":
        name = next(_MLP[word] for word in tail if word in _MLP)
        return f"{number}.mlp.{name}.{tail[-1]}", value if name == "dwconv" else _as_linear(value)
    found = _in_attention(cfg, i, number, tail[1:], value)
    return found and (f"{number}.{found[0]}", found[1])


def _in_attention(cfg: DATConfig, i: int, j: int, tail: list[str], value: Tensor) -> tuple[str, Tensor] | None:
    """The same below the block, for an entry of its mixer."""
    kind, name = cfg.kind(i, j), tail[0]
    if name in _BUFFERS or (name, tail[-1]) == ("dep_conv", "weight") or (name == "conv_offset" and cfg.at("pooled", i)):
        return None
    if kind == "X":
        return f"conv.{name}", value
    if name == "relative_position_bias_table" and kind == "E":
        return "attn.k_table", value.flatten(1).view(-1, 9)
    if name == "relative_position_bias_table":
        side = round(len(value) ** 0.5)
        return "attn.rel_bias", value.view(side, side, -1).permute(2, 0, 1).flip(1, 2)  # query minus key to key minus query
    if name == "rpe_table":
        kind = cfg.at("bias", i)
        own = {"table": "rel_bias", "mlp": "cpb_mlp", "conv": "pe_conv", "fixed": "pair_bias"}.get(kind, name)
        return ".".join(["attn", own, *tail[1:]]), value.flip(1, 2) if kind == "table" and value.ndim == 3 else value
    if len(tail) == 1:
        return f"attn.{_ATTENTION.get(name, name)}", value
    part = ".".join(tail[:-1])
    part = _ATTENTION.get(part, part)
    return f"attn.{part}.{tail[-1]}", value if part in ("offset.conv", "sr.proj", "shift") else _as_linear(value)


# -- variants -------------------------------------------------------------------------------------------------------


def _v1(embed_dim: int, depth: int, drop_path_rate: float, window_size: int = 7, img_size: int = 224) -> DATConfig:
    first = embed_dim // 32
    return DATConfig(
        version=1,
        embed_dim=embed_dim,
        depths=(2, 2, depth, 2),
        num_heads=(first, 2 * first, 4 * first, 8 * first),
        blocks=("LS", "LS", "LD", "LD"),
        conv_patches=False,
        conv_mlp=False,
        lpu=False,
        window_size=window_size,
        groups=(1, 1, first, 2 * first),  # of the last two stages; the first two have no use for them
        sample_strides=1,
        offset_range=2.0,
        img_size=img_size,
        drop_path_rate=drop_path_rate,
    )


def _v2(embed_dim: int, groups: tuple[int, ...], drop_path_rate: float) -> DATConfig:
    first = embed_dim // 32
    return DATConfig(
        embed_dim=embed_dim,
        num_heads=(first, 2 * first, 4 * first, 8 * first),
        groups=groups,
        drop_path_rate=drop_path_rate,
    )


_PP_TINY = _v2(64, (1, 2, 4, 8), 0.2)
_PP_BASE = _v2(128, (2, 4, 8, 16), 0.7)

VARIANTS = {
    "dat_micro": DATConfig(
        embed_dim=32,
        depths=(1, 2, 1),
        num_heads=(1, 2, 4),
        mlp_ratio=2.0,
        blocks=("S", "ND", "D"),
        window_size=4,
        kernel_size=3,
        groups=(1, 2, 2),
        sample_strides=(4, 2, 1),
        offset_kernels=(7, 5, 3),
        img_size=32,
    ),
    "dat_tiny": _v1(96, 6, 0.2),
    "dat_small": _v1(96, 18, 0.3),
    "dat_base": _v1(128, 18, 0.5),
    "dat_base_384": _v1(128, 18, 0.5, window_size=12, img_size=384),
    "dat_plus_tiny": replace(_PP_TINY, conv_patches=False, conv_mlp=False, lpu=False),
    "dat_pp_tiny": _PP_TINY,
    "dat_pp_small": _v2(96, (1, 2, 3, 6), 0.4),
    "dat_pp_base": _PP_BASE,
    "dat_pp_base_384": replace(_PP_BASE, img_size=384, table_img_size=224, drop_path_rate=0.6),
}

# evaluated as published: squashed to a square, of 256 pixels for a crop of 224
register_family(
    __name__,
    DAT,
    {name: variant for name, variant in VARIANTS.items() if variant.img_size == 224},
    first_conv="stem.proj",
    data={"crop_mode": "squash", "crop_pct": 0.875},
)
register_family(
    __name__,
    DAT,
    {name: variant for name, variant in VARIANTS.items() if variant.img_size != 224},
    first_conv="stem.proj",
    data={"crop_mode": "squash", "crop_pct": 1.0},
)
