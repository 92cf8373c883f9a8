"""SOFT: softmax-free transformer. Lu et al. 2021, arXiv:2110.11945; with the normed kernel Lu et al. 2022, arXiv:2207.03341.

New here: attention whose scores are a Gaussian kernel of queries that are keys as well. Such a matrix is nearly of low rank,
so tokens meet a few landmarks instead of each other, ``k(q, l) k(l, l)^-1 k(l, q) v``, at a cost that grows linearly with the
map. The inverse is Newton's, a run of products.

SOFT-Norm begins its inverse with a number that follows the largest sum in the whole batch, so what it says of an image depends
a little on the others. ``batch_statistic=False`` takes one number for each image and head instead.

Deviations:
- any image size; rows and columns that fill no landmark's cell have none of their own, as published;
- the classifier reads a class token of the last stage. ``forward_features`` returns the normed map of that stage, shifted in
  each channel until its mean is the normed class token: so the mean, which the head takes, is what was published. Maps of
  ``forward_intermediates`` are the patches alone, as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vitzoo.layers import FullAttention, Mlp, OnTokens, PostNormBlock, Slot
from vitzoo.layers.beside import ClassBlock, ClassNorm, ConvEmbedding
from vitzoo.layers.softmax_free import SoftmaxFreeAttention
from vitzoo.models._contract import pair
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family


@dataclass(frozen=True)
class SOFTConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        stem_dim: channels between the stem's convolutions.
        ratios: for each stage but the last, tokens on a side of a landmark's cell.
        local_sizes: for each of these, rows and columns of the convolution beside the attention.
        normed: SOFT-Norm.
        newton_steps: steps of the inverse.
        batch_statistic: SOFT-Norm: begin the inverse with one number for the whole batch, as published.
        positions: image size that the learned positions are for, whatever ``img_size`` is.
    """

    embed_dim: int | tuple[int, ...] = (64, 128, 320, 512)
    num_heads: tuple[int, ...] = (2, 4, 10, 16)
    stem_dim: int = 32
    ratios: tuple[int, ...] = (8, 4, 2)
    local_sizes: tuple[int, ...] = (9, 5, 3)
    normed: bool = False
    newton_steps: int = 20
    batch_statistic: bool = True
    positions: int | tuple[int, int] = 224

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("ratios", self.ratios), ("local_sizes", self.local_sizes)):
            if len(value) != len(self.depths) - 1:
                raise ValueError(f"{name} {value} names {len(value)} stages, and {len(self.depths) - 1} have landmarks.")
        if self.feature_norm:
            raise ValueError(
                "feature_norm leaves the classifier without its norm, which SOFT's class token needs. Leave it False."
            )


class Stem(ConvEmbedding):
    """``ConvEmbedding`` from an image ``[B, in_chans, H, W]``."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.permute(0, 2, 3, 1))


class SOFT(Pyramid):
    """SOFT or SOFT-Norm on the pyramid trunk."""

    Config = SOFTConfig

    cfg: SOFTConfig

    def grid(self, i: int) -> tuple[int, int]:
        """Rows and columns of the positions of stage ``i``."""
        height, width = (-(-n // self.cfg.strides[i]) for n in pair(self.cfg.positions))
        return height, width

    def make_stem(self) -> nn.Module:
        cfg = self.cfg
        return Stem((cfg.in_chans, cfg.stem_dim, cfg.stem_dim, cfg.dims[0]), (2, 1, 2), self.grid(0))

    def make_downsample(self, i: int) -> nn.Module:
        return ConvEmbedding((self.cfg.dims[i - 1], self.cfg.dims[i]), (2,), self.grid(i), i == len(self.cfg.depths) - 1)

    def slot(self, i: int, j: int) -> Slot:
        return replace(super().slot(i, j), prefix_tokens=int(i == len(self.cfg.depths) - 1), packed=False)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg, dim = self.cfg, self.cfg.dims[i]
        if i < len(cfg.ratios):
            mixer = self.mixer(i, j, lambda: self.make_attention(i, j))
            return PostNormBlock(dim, mixer, Mlp(dim, cfg.mlp_dim(i), cfg.proj_drop_rate, gelu="tanh"), drop_path)
        kwargs: Any = {"packed": False, "qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        mixer = self.mixer(i, j, lambda: FullAttention(dim, cfg.num_heads[i], **kwargs))
        mixer = mixer if cfg.mixer_of(i, j) is None else OnTokens(mixer, 1)
        mlp = Mlp(dim, cfg.mlp_dim(i), cfg.proj_drop_rate)
        return ClassBlock(dim, mixer, mlp=mlp, drop_path=drop_path, layer_scale=cfg.layer_scale, norm_eps=1e-6)

    def make_attention(self, i: int, j: int) -> nn.Module:
        """The softmax-free attention of block ``j`` of stage ``i``."""
        cfg = self.cfg
        kwargs: Any = {"normed": cfg.normed, "batch_statistic": cfg.batch_statistic, "steps": cfg.newton_steps}
        return SoftmaxFreeAttention(self.slot(i, j), ratio=cfg.ratios[i], size=cfg.local_sizes[i], **kwargs)

    def make_norm(self) -> nn.Module:
        return ClassNorm(self.num_features, eps=1e-6)

    def as_map(self, i: int, x: Tensor) -> Tensor:
        return x[..., : self.cfg.dims[i]]

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: SOFTConfig) -> dict[str, Tensor]:
        """From fudan-zvg/SOFT."""
        ours = {}
        for key, value in state.items():
            key = f"pos_embed{len(cfg.depths)}.cls_token" if key == "cls_token" else key
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            ours[key] = value
        return ours


PUBLISHED = (
    # a stage's convolutions are written as triples, with their norm and ReLU
    (r"\.proj\.(\d)\.", lambda m: f".convs.{int(m[1]) // 3}.{('conv', 'norm')[int(m[1]) % 3]}."),
    (r"^pos_embed(\d)$", r"pos_embed\1.pos_embed"),
    (r"^(patch_embed|pos_embed)(\d)\.", lambda m: f"stages.{int(m[2]) - 1}.downsample."),
    (r"^stages\.0\.downsample\.", "stem."),
    (r"^block(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks."),
    (r"\.att\.mha\.attn\.Qlandmark_op\.", ".attn.landmarks."),
    (r"\.att\.mha\.attn\.Qnorm_act\.0\.", ".attn.norm."),
    (r"\.att\.mha\.attn\.conv\.", ".attn.local."),
    (r"\.att\.mha\.W_([qv])\.", r".attn.\1."),
    (r"\.att\.mha\.ff\.", ".attn.proj."),
    (r"\.att\.ff(\d)\.", r".mlp.fc\1."),
    (r"\.att\.norm(\d)\.", r".norm\1."),
    (r"^head\.(?!fc\.)", "head.fc."),
)

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"depths": (1, 2, 3, 2)},
    "small": {"depths": (1, 3, 20, 4)},
    "medium": {"depths": (1, 3, 29, 5), "embed_dim": (64, 128, 288, 512), "num_heads": (2, 4, 9, 16)},
    "large": {"depths": (1, 3, 40, 5)},
    "huge": {"depths": (1, 5, 49, 5), "embed_dim": (64, 128, 352, 512), "num_heads": (2, 4, 11, 16)},
}
_MICRO: Any = {
    "embed_dim": (16, 32, 64),
    "depths": (1, 1, 1),
    "num_heads": (1, 2, 2),
    "mlp_ratio": 2.0,
    "stem_dim": 8,
    "ratios": (4, 2),
    "local_sizes": (5, 3),
    "newton_steps": 8,  # enough for a handful of landmarks
    "positions": 32,
    "img_size": 32,
}

VARIANTS = {
    f"soft_{norm}{size}": SOFTConfig(**{"drop_path_rate": 0.0 if size == "micro" else 0.1, **fields}, normed=bool(norm))
    for norm in ("", "norm_")
    for size, fields in {"micro": _MICRO, **_SIZES}.items()
}

register_family(__name__, SOFT, VARIANTS, first_conv="stem.convs.0.conv")
