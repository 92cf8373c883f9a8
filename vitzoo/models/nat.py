"""NAT, DiNAT, DiNAT_s and their isotropic kin. Hassani et al. 2022, arXiv:2204.07143; arXiv:2209.15001.

New here: every token attends to the k x k tokens nearest to it. Near a border the neighborhood moves inward instead of
shrinking, so each query has exactly k^2 keys. Dilation spreads the same keys over a wider field.

Deviations from the published code: none in what is computed. A map shorter than kernel times dilation is padded before
the projection, as NATTEN 0.14 and 0.15 did (later versions refuse it). An isotropic net is written as a pyramid that
never goes down: four stages of three blocks at one width and stride. ``vitrpb`` (global attention with the same bias
table) takes any image size by resizing its table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitzoo.layers import Block, ConvDownsample, ConvStem, Mlp, PatchEmbed, PatchMerging, PatternAttention
from vitzoo.models._contract import pair
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family
from vitzoo.patterns import everywhere, neighborhood


@dataclass(frozen=True)
class NATConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        kernel_size: tokens on a side of a neighborhood, one odd number or one per stage; None: the whole map.
        dilations: for each stage the dilation of each block; a shorter list repeats. Empty: 1 everywhere.
        patch_size: None for the overlapping convolutional stem (stride 4); else pixels on a side of a patch.
        downsample: "conv" (overlapping convolution), "merge" (Swin's PatchMerging) or "none" (isotropic).
    """

    embed_dim: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    mlp_ratio: float = 3.0
    kernel_size: int | tuple[int, ...] | None = 7
    dilations: tuple[tuple[int, ...], ...] = ()
    patch_size: int | None = None
    downsample: str = "conv"

    @property
    def strides(self) -> tuple[int, ...]:
        factor = 1 if self.downsample == "none" else 2
        return tuple((self.patch_size or 4) * factor**i for i in range(len(self.depths)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.downsample not in ("conv", "merge", "none"):
            raise ValueError(f"downsample is 'conv', 'merge' or 'none', got '{self.downsample}'.")
        for name, value in (("kernel_size", self.kernel_size), ("dilations", self.dilations)):
            if isinstance(value, tuple) and value and len(value) != len(self.depths):
                raise ValueError(f"{name} {value} names {len(value)} stages, depths {self.depths} {len(self.depths)}.")


class NAT(Pyramid):
    """Neighborhood attention on the pyramid trunk: NAT, DiNAT, DiNAT_s, isotropic and global."""

    Config = NATConfig

    cfg: NATConfig

    def make_stem(self) -> nn.Module:
        cfg = self.cfg
        if cfg.patch_size is None:
            return ConvStem(cfg.dims[0], cfg.in_chans)
        return PatchEmbed(cfg.dims[0], cfg.patch_size, cfg.in_chans, norm=True)

    def make_downsample(self, i: int) -> nn.Module:
        dims = self.cfg.dims
        if self.cfg.downsample == "none":
            return nn.Identity()
        return (ConvDownsample if self.cfg.downsample == "conv" else PatchMerging)(dims[i - 1], dims[i])

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: self.make_attention(i, j)),
            mlp=Mlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
        )

    def make_attention(self, i: int, j: int) -> PatternAttention:
        """The attention of block ``j`` of stage ``i``."""
        cfg = self.cfg
        kwargs: dict[str, Any] = {"qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        if cfg.kernel_size is None:
            height, width = (-(-n // cfg.strides[i]) for n in pair(cfg.img_size or 224))
            table = (2 * height - 1, 2 * width - 1)
            return PatternAttention(cfg.dims[i], cfg.num_heads[i], everywhere, table_size=table, **kwargs)
        kernel = cfg.kernel_size if isinstance(cfg.kernel_size, int) else cfg.kernel_size[i]
        dilation = cfg.dilations[i][j % len(cfg.dilations[i])] if cfg.dilations else 1
        field = kernel * dilation
        return PatternAttention(
            cfg.dims[i], cfg.num_heads[i], neighborhood(kernel, dilation=dilation), pad_minimum=(field, field), **kwargs
        )

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: NATConfig) -> dict[str, Tensor]:
        """From SHI-Labs/Neighborhood-Attention-Transformer: NAT and DiNAT, DiNAT_s, isotropic, dense backbones."""
        ours = {}
        for key, value in state.items():
            head, *rest = key.split(".")
            if rest and rest[-1] == "relative_position_index":
                continue  # a buffer, rebuilt in forward
            if head in ("levels", "layers"):
                if cfg.downsample == "none":  # one flat list of blocks
                    stage, block = _place(int(rest[0]), cfg.depths)
                    rest = [str(stage), "blocks", str(block), *rest[1:]]
                elif rest[1] == "downsample":  # published at the end of level i, ours at the start of stage i + 1
                    rest = [str(int(rest[0]) + 1), *rest[1:]]
                if rest[-1] in ("gamma1", "gamma2"):
                    rest = [*rest[:-1], f"ls{rest[-1][-1]}", "gamma"]
                if rest[-1] == "rpb":
                    rest = [*rest[:-1], "rel_bias"]
                key = ".".join(["stages", *rest])
            elif head == "patch_embed":
                names = {"0": "conv1", "1": "conv2"}
                if rest[0] == "proj" and rest[1] in names:
                    rest = [names[rest[1]], *rest[2:]]
                key = ".".join(["stem", *rest])
            elif head == "head" and rest[0] != "fc":
                key = ".".join(["head.fc", *rest])
            elif head.startswith("norm") and head != "norm":
                key = ".".join(["feature_norms", head[4:], *rest])
            ours[key] = value
        return ours


def _place(index: int, depths: tuple[int, ...]) -> tuple[int, int]:
    """Stage and block of the ``index``-th block of the whole net."""
    for stage, depth in enumerate(depths):
        if index < depth:
            return stage, index
        index -= depth
    raise ValueError(f"The checkpoint has more blocks than depths {depths}.")


def _dilated(stage0: int, stage1: int, stage2: int) -> tuple[tuple[int, ...], ...]:
    return (1, stage0), (1, stage1), (1, stage2), (1,)


_MINI = NATConfig(drop_path_rate=0.2)
_TINY = NATConfig(depths=(3, 4, 18, 5), drop_path_rate=0.2)
_SMALL = NATConfig(
    embed_dim=96, depths=(3, 4, 18, 5), num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path_rate=0.3, layer_scale=1e-5
)
_BASE = NATConfig(
    embed_dim=128, depths=(3, 4, 18, 5), num_heads=(4, 8, 16, 32), mlp_ratio=2.0, drop_path_rate=0.5, layer_scale=1e-5
)
_LARGE = NATConfig(embed_dim=192, depths=(3, 4, 18, 5), num_heads=(6, 12, 24, 48), mlp_ratio=2.0, drop_path_rate=0.35)


def _with(cfg: NATConfig, **changes: Any) -> NATConfig:
    return NATConfig(**{**vars(cfg), **changes})


def _swin_shell(embed_dim: int, depth: int, drop_path_rate: float, img_size: int = 224) -> NATConfig:
    return NATConfig(
        embed_dim=embed_dim,
        depths=(2, 2, depth, 2),
        num_heads=tuple(embed_dim // 32 * 2**i for i in range(4)),
        mlp_ratio=4.0,
        dilations=_dilated(8, 4, 2) if img_size == 224 else ((1, 13), (1, 6), (1, 3), (1,)),
        patch_size=4,
        downsample="merge",
        img_size=img_size,
        drop_path_rate=drop_path_rate,
    )


def _isotropic(embed_dim: int, drop_path_rate: float, dilations: tuple[int, ...] = (1,), kernel: int | None = 7) -> NATConfig:
    return NATConfig(
        embed_dim=embed_dim,
        depths=(3, 3, 3, 3),
        num_heads=(embed_dim // 32,) * 4,
        mlp_ratio=4.0,
        kernel_size=kernel,
        # blocks alternate through the whole net, so every second stage begins with the other dilation
        dilations=(dilations, dilations[::-1]) * 2,
        patch_size=16,
        downsample="none",
        widen=1,
        drop_path_rate=drop_path_rate,
    )


VARIANTS = {
    "nat_micro": NATConfig(
        embed_dim=32, depths=(2, 2, 1), num_heads=(1, 2, 4), mlp_ratio=2.0, kernel_size=(5, 3, 3), img_size=32
    ),
    "nat_mini": _MINI,
    "nat_tiny": _TINY,
    "nat_small": _SMALL,
    "nat_base": _BASE,
    "dinat_mini": _with(_MINI, dilations=_dilated(8, 4, 2)),
    "dinat_tiny": _with(_TINY, dilations=_dilated(8, 4, 2)),
    "dinat_small": _with(_SMALL, dilations=_dilated(8, 4, 2), layer_scale=None),
    "dinat_base": _with(_BASE, dilations=_dilated(8, 4, 2)),
    "dinat_large": _with(_LARGE, dilations=_dilated(8, 4, 2)),
    "dinat_large_384": _with(_LARGE, dilations=_dilated(13, 6, 3), img_size=384),
    "dinat_large_384_11x11": _with(_LARGE, dilations=_dilated(8, 4, 2), img_size=384, kernel_size=11),
    "dinat_s_tiny": _swin_shell(96, 6, 0.2),
    "dinat_s_small": _swin_shell(96, 18, 0.3),
    "dinat_s_base": _swin_shell(128, 18, 0.5),
    "dinat_s_large": _swin_shell(192, 18, 0.35),
    "dinat_s_large_384": _swin_shell(192, 18, 0.35, img_size=384),
    "nat_isotropic_small": _isotropic(384, 0.1),
    "nat_isotropic_base": _isotropic(768, 0.4),
    "dinat_isotropic_small": _isotropic(384, 0.1, dilations=(1, 2)),
    "dinat_isotropic_base": _isotropic(768, 0.4, dilations=(1, 2)),
    "vitrpb_small": _isotropic(384, 0.1, kernel=None),
    "vitrpb_base": _isotropic(768, 0.4, kernel=None),
}

register_family(__name__, NAT, VARIANTS, first_conv="stem.conv1", patch_first_conv="stem.proj")
