"""PatchConvNet: attention-based aggregation. Touvron et al. 2021, arXiv:2112.13692.

New here: a convolutional column of one width, without a pyramid, whose class token reads the last map by one attention layer
instead of an average. What it reads of each patch is a picture of the decision: ``patch_weights``.

Deviations:
- any image size, also not square;
- the column is written as four stages of one width and stride, so that features come from four depths;
- with a class token for each class (``per_class``) the classifier is one table with a row for each, not a list of layers.
  Its features before the classifier are the mean of the class tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vitzoo.layers import ClassAttentionHead, DepthwiseConv, Linear
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family


@dataclass(frozen=True)
class PatchConvNetConfig(PyramidConfig):
    """Adds to the pyramid's choices; drop path is the same in all blocks, ``num_heads`` are those of the aggregation.

    Attributes:
        mlp_ratio: hidden channels of the aggregation's MLP over its width; the column has none.
        patch_size: pixels per token, a power of 2; the stem has a convolution for each.
        per_class: a class token for each class, that reads patches only.
    """

    embed_dim: int | tuple[int, ...] = 384
    depths: tuple[int, ...] = (15, 15, 15, 15)
    num_heads: tuple[int, ...] = (1, 1, 1, 1)
    mlp_ratio: float | tuple[float, ...] = 3.0
    layer_scale: float | None = 1e-6
    widen: int = 1
    global_pool: str = "token"
    patch_size: int = 16
    per_class: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"patch_size is a power of 2, got {self.patch_size}.")

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch_size,) * len(self.depths)


class Stem(nn.Sequential):
    """3x3 convolutions of stride 2, each twice as wide, GELUs between, no norm: an image to ``[B, h, w, C]``."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        widths = [in_chans, *(dim >> i for i in reversed(range(patch_size.bit_length() - 1)))]
        super().__init__()
        for before, after in pairwise(widths):
            if len(self):
                self.append(nn.GELU())
            self.append(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False))

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image).permute(0, 2, 3, 1)


class SqueezeExcite(nn.Module):
    """``x * sigmoid(W2 relu(W1 mean(x)))``, the mean over the map ``[B, H, W, C]``, a quarter of the channels between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_reduce = Linear(dim, round(dim / 4))
        self.act = nn.ReLU()
        self.conv_expand = Linear(round(dim / 4), dim)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_expand(self.act(self.conv_reduce(x.mean(dim=(1, 2), keepdim=True)))).sigmoid()


class PatchConvBlock(nn.Module):
    """``x + drop_path(scale(W2 se(gelu(dw3x3(gelu(W1 norm x))))))``: ``[B, H, W, C]``, unchanged; section 3.1."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.ls = LayerScale(dim, init_values=layer_scale) if layer_scale is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.ls(self.mixer(self.norm(x))))


class PatchConv(nn.Sequential):
    """What a block computes of its normed map."""

    def __init__(self, dim: int) -> None:
        super().__init__(Linear(dim, dim), nn.GELU(), DepthwiseConv(dim), nn.GELU(), SqueezeExcite(dim), Linear(dim, dim))

    def init_weights(self) -> None:
        """PyTorch's own for convolutions, which the linear layers are in the published code."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.reset_parameters()


class AggregationHead(ClassAttentionHead):
    """Learned class tokens, one or, with ``per_class``, one for each class and a row of the classifier for each of them."""

    def make_pooling(self) -> None:
        super().make_pooling()
        self.cls_token: Any = None

    def make_classifier(self, num_classes: int) -> None:
        super().make_classifier(num_classes)
        if self.pool_type:
            tokens = num_classes if num_classes and not self.read_classes else 1
            if self.cls_token is None or self.cls_token.shape[1] != tokens:
                self.cls_token = nn.Parameter(torch.empty(1, tokens, self.num_features))
                self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal 0.02 for the class tokens."""
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def classes(self, x: Tensor) -> Tensor:
        # a copy: PyTorch's FLOP counter cannot follow a view of a parameter that was made without gradients
        return self.cls_token.repeat(x.shape[0], 1, 1)

    def classify(self, c: Tensor, x: Tensor) -> Tensor:
        if self.read_classes:
            return super().classify(c, x)
        return (c * self.fc.weight).sum(dim=-1) + self.fc.bias


class PatchConvNet(Pyramid):
    """PatchConvNet as a pyramid that never goes down."""

    Config = PatchConvNetConfig

    cfg: PatchConvNetConfig

    def make_stem(self) -> nn.Module:
        return Stem(self.cfg.in_chans, self.cfg.dims[0], self.cfg.patch_size)

    def make_downsample(self, i: int) -> nn.Module:
        del i
        return nn.Identity()

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        del drop_path
        cfg = self.cfg
        mixer = self.mixer(i, j, lambda: PatchConv(cfg.dims[i]))
        return PatchConvBlock(cfg.dims[i], mixer, cfg.drop_path_rate, cfg.layer_scale)

    def make_norm(self) -> nn.Module:
        return nn.Identity()  # the head has it, behind the class attention

    def make_head(self) -> nn.Module:
        cfg = self.cfg
        return AggregationHead(
            self.num_features,
            cfg.num_classes,
            cfg.num_heads[-1],
            cfg.mlp_dim(-1),
            pool_type=cfg.global_pool,
            drop_rate=cfg.drop_rate,
            layer_scale=cfg.layer_scale,
            read_classes=not cfg.per_class,
        )

    def patch_weights(self, image: Tensor) -> Tensor:
        """What each class token takes of each patch of an image ``[B, in_chans, H, W]``: ``[B, P, h, w]``, mean over heads.

        P is 1, or the number of classes with ``per_class``. Weights of a token add up to 1 with what it takes of itself.
        """
        x = self.forward_features(image)
        tokens = x.flatten(2).transpose(1, 2)
        weights = self.head.attention.weights(self.head.classes(tokens), tokens).mean(dim=1)
        return weights.unflatten(-1, x.shape[2:])

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: PatchConvNetConfig) -> dict[str, Tensor]:
        """From facebookresearch/deit."""
        ours: dict[str, Tensor] = {}
        for key, value in state.items():
            row = re.fullmatch(r"head\.(\d+)\.(weight|bias)", key)
            if row:  # a layer for each class: its place in the table
                name = f"head.fc.{row[2]}"
                table = ours.get(name, value.new_zeros(cfg.num_classes, *value.shape[1:]))
                ours[name] = table.index_copy(0, torch.tensor([int(row[1])]), value)
                continue
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            column = re.match(r"blocks\.(\d+)\.", key)
            if column:
                stage, block = _place(int(column[1]), cfg.depths)
                key = f"stages.{stage}.blocks.{block}.{key[column.end() :]}"
            # what is a linear layer here is a 1x1 convolution there
            ours[key] = value.flatten(1) if value.shape[2:] == (1, 1) else value
        return ours


PUBLISHED = (
    (r"^patch_embed\.proj\.(\d)\.0\.", r"stem.\1."),
    (r"^(blocks\.\d+)\.attn\.qkv_pos\.", r"\1.mixer."),
    (r"^(blocks\.\d+)\.norm1\.", r"\1.norm."),
    (r"^(blocks\.\d+)\.gamma_1$", r"\1.ls.gamma"),
    (r"^blocks_token_only\.0\.gamma_(\d)$", r"head.attention.ls\1.gamma"),
    (r"^blocks_token_only\.0\.(attn\.)?", "head.attention."),
    (r"^cls_token$", "head.cls_token"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _place(index: int, depths: tuple[int, ...]) -> tuple[int, int]:
    """Stage and block of the ``index``-th block of the column."""
    stage = 0
    while index >= depths[stage]:
        index, stage = index - depths[stage], stage + 1
    return stage, index


def _patchconvnet(dim: int, depth: int, img_size: int = 224, per_class: bool = False) -> PatchConvNetConfig:
    return PatchConvNetConfig(
        embed_dim=dim,
        depths=(depth // 4,) * 4,
        layer_scale=1e-4 if (dim, depth) == (384, 60) else 1e-6,
        img_size=img_size,
        per_class=per_class,
    )


VARIANTS = {
    "patchconvnet_micro": PatchConvNetConfig(
        embed_dim=64, depths=(2, 2, 2), num_heads=(1, 1, 1), layer_scale=None, patch_size=4, img_size=32
    ),
    "patchconvnet_s60": _patchconvnet(384, 60),
    "patchconvnet_s120": _patchconvnet(384, 120),
    "patchconvnet_b60": _patchconvnet(768, 60),
    "patchconvnet_b120": _patchconvnet(768, 120),
    "patchconvnet_l60": _patchconvnet(1024, 60),
    "patchconvnet_l120": _patchconvnet(1024, 120),
    "patchconvnet_s60_multi": _patchconvnet(384, 60, per_class=True),
    "patchconvnet_s60_in21k": _patchconvnet(384, 60),
    "patchconvnet_s60_384_in21k": _patchconvnet(384, 60, 384),
    "patchconvnet_s60_512_in21k": _patchconvnet(384, 60, 512),
    "patchconvnet_b60_in21k": _patchconvnet(768, 60),
    "patchconvnet_b60_384_in21k": _patchconvnet(768, 60, 384),
    "patchconvnet_b120_in21k": _patchconvnet(768, 120),
    "patchconvnet_b120_384_in21k": _patchconvnet(768, 120, 384),
}

register_family(__name__, PatchConvNet, VARIANTS, first_conv="stem.0")
