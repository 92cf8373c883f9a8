"""SpectFormer. Patro, Namboodiri, Agneeswaran 2023, arXiv:2304.06446.

New here: early blocks mix tokens by a learned filter of the whole map, a product in the frequency domain, and later ones by
attention. The vanilla form is a plain transformer whose first four blocks are spectral; the hierarchical one is a pyramid
whose first two stages are, with class attention before the classifier and a second classifier of every token.

Deviations from the published code:
- any image size: filters are learned at the frequencies of ``img_size`` and resized to those of the map, bilinearly, the
  frequency 0 staying in its corner; learned positions (vanilla) likewise, as in any plain transformer here;
- ``num_heads`` is 6 in every published vanilla block, which does not divide the width of ``spectformer_b``; we take heads
  of 64 channels. No parameter depends on it;
- the hierarchical one always returns what it returns in evaluation. Mixed tokens, labels for each of them and their loss
  belong to the recipe (token labelling), not the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vitzoo.layers import (
    Block,
    ClassAttentionHead,
    ConvDownsample,
    ConvNorm,
    DepthwiseMlp,
    FullAttention,
    Mlp,
    Slot,
    init_by_fan_out,
    register_mixer,
)
from vitzoo.layers.mixers import choose_mixer
from vitzoo.models._plain import Plain, PlainConfig
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family

torch.fx.wrap("filter_map")


def resize_filter(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A filter ``[h, w, C, 2]`` at other frequencies ``size``, bilinear; corners stay corners, the mean the mean."""
    if not torch.compiler.is_compiling() and tuple(weight.shape[:2]) == tuple(size):
        return weight
    picture = weight.flatten(2).permute(2, 0, 1)[None]
    picture = F.interpolate(picture, size=size, mode="bilinear", align_corners=True)
    return picture[0].permute(1, 2, 0).unflatten(-1, (-1, 2))


def filter_map(x: Tensor, weight: Tensor) -> Tensor:
    """``irfft2(rfft2(x) * weight)`` over the rows and columns of ``x`` ``[B, H, W, C]``, at least in fp32.

    ``weight`` ``[h, w, C, 2]`` holds real and imaginary parts, columns up to half the sampling rate.
    """
    height, width = x.shape[1], x.shape[2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfft2(x.to(dtype), dim=(1, 2), norm="ortho")
    resized = resize_filter(weight.to(dtype), (height, width // 2 + 1))
    filtered = spectrum * torch.view_as_complex(resized.contiguous())
    return torch.fft.irfft2(filtered, s=(height, width), dim=(1, 2), norm="ortho").to(x.dtype)


@register_mixer("spectral")
class SpectralGating(nn.Module):
    """One learned complex weight for each frequency and channel of the map: a circular convolution as large as it is.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        height, width = slot.map_size
        self.complex_weight = nn.Parameter(torch.empty(height, width // 2 + 1, slot.dim, 2))
        self.init_weights()

    def init_weights(self) -> None:
        """Normal 0.02."""
        nn.init.normal_(self.complex_weight, std=0.02)

    def resize_state(self, value: Tensor) -> Tensor:
        """A published filter of another image size in the size of this one."""
        return resize_filter(value, (self.complex_weight.shape[0], self.complex_weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return filter_map(x, self.complex_weight)


# -- vanilla ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpectFormerConfig(PlainConfig):
    """Adds to the plain transformer's choices.

    Attributes:
        alpha: spectral blocks, before those that attend.
    """

    class_token: bool = False
    global_pool: str = "avg"
    fc_norm: bool | None = False
    alpha: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefix_tokens:
            raise ValueError(f"SpectFormer filters maps, which hold no prefix tokens; {self.prefix_tokens} were asked for.")


class SpectralBlock(nn.Module):
    """``x + drop_path(mlp(norm(filter(norm(x)))))`` on tokens ``[B, H * W, C]``: one residual around both."""

    def __init__(self, slot: Slot, mlp: nn.Module, drop_path: float, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(slot.dim, eps=norm_eps)
        self.filter = SpectralGating(slot)
        self.norm2 = nn.LayerNorm(slot.dim, eps=norm_eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        filtered = self.filter(self.norm1(x).unflatten(1, (height, width))).flatten(1, 2)
        return x + self.drop_path(self.mlp(self.norm2(filtered)))


class SpectFormer(Plain):
    """Vanilla SpectFormer on the plain trunk. Every token is one of the map's, so ``forward_features`` returns it as NCHW."""

    Config = SpectFormerConfig

    cfg: SpectFormerConfig

    def finish(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().finish(x, grid).mT.unflatten(2, grid)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) if self.global_pool == "avg" else x

    def takes_grid(self, i: int) -> bool:
        return i < self.cfg.alpha or super().takes_grid(i)

    def make_block(self, i: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        if i >= cfg.alpha or choose_mixer(cfg.mixer, i) is not None:
            return super().make_block(i, drop_path)
        mlp = Mlp(cfg.embed_dim, int(cfg.embed_dim * cfg.mlp_ratio), cfg.proj_drop_rate)
        return SpectralBlock(Slot(cfg.embed_dim, cfg.num_heads, cfg.grid_size, block=i), mlp, drop_path, self.NORM_EPS)


# -- hierarchical -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SpectFormerHConfig(PyramidConfig):
    """Adds to the pyramid's choices.

    Attributes:
        stem_dim: channels inside the stem.
        spectral_stages: stages whose blocks filter, before those that attend.
        token_label: add half of the largest logit that a second classifier gives any token.
    """

    embed_dim: int | tuple[int, ...] = (64, 128, 320, 448)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    num_heads: tuple[int, ...] = (2, 4, 10, 14)
    mlp_ratio: float | tuple[float, ...] = (8, 8, 4, 4)
    global_pool: str = "token"
    stem_dim: int = 32
    spectral_stages: int = 2
    token_label: bool = True


class Stem(nn.Module):
    """7x7 and two 3x3 convolutions with batch norm and ReLU, then down again: ``[B, c, H, W]`` to a map of stride 4."""

    def __init__(self, dim: int, out_dim: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_chans, dim, 7, stride=2)
        self.conv2 = ConvNorm(dim, dim)
        self.conv3 = ConvNorm(dim, dim)
        self.proj = ConvDownsample(dim, out_dim, bias=True)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.conv1(image.permute(0, 2, 3, 1)))
        return self.proj(F.relu(self.conv3(F.relu(self.conv2(x)))))


class TokenLabelHead(ClassAttentionHead):
    """Class attention that starts from the mean, and a second classifier of every token where ``token_label``."""

    def __init__(self, *args: Any, token_label: bool, **kwargs: Any) -> None:
        self.token_label = token_label
        super().__init__(*args, **kwargs)

    def make_classifier(self, num_classes: int) -> None:
        super().make_classifier(num_classes)
        if self.token_label:
            self.aux = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def classes(self, x: Tensor) -> Tensor:
        return x.mean(dim=1, keepdim=True)

    def classify(self, c: Tensor, x: Tensor) -> Tensor:
        logits = self.fc(c[:, 0])
        return logits + 0.5 * self.aux(self.norm(x)).max(dim=1).values if self.token_label else logits


class SpectFormerH(Pyramid):
    """Hierarchical SpectFormer on the pyramid trunk."""

    Config = SpectFormerHConfig

    cfg: SpectFormerHConfig

    def make_stem(self) -> nn.Module:
        return Stem(self.cfg.stem_dim, self.cfg.dims[0], self.cfg.in_chans)

    def make_downsample(self, i: int) -> nn.Module:
        dims = self.cfg.dims
        return nn.Sequential(nn.LayerNorm(dims[i - 1], eps=1e-6), ConvDownsample(dims[i - 1], dims[i], bias=True))

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: self.make_attention(i, j)),
            mlp=DepthwiseMlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_eps=1e-6,
        )

    def make_attention(self, i: int, j: int) -> nn.Module:
        """The mixer of block ``j`` of stage ``i``: a filter, later attention."""
        cfg = self.cfg
        if i < cfg.spectral_stages:
            return SpectralGating(self.slot(i, j))
        kwargs: Any = {"qkv_bias": cfg.qkv_bias, "proj_drop": cfg.proj_drop_rate}
        return FullAttention(cfg.dims[i], cfg.num_heads[i], packed=False, **kwargs)

    def make_norm(self) -> nn.Module:
        return nn.Identity()  # the head has it, behind the class attention

    def make_head(self) -> nn.Module:
        cfg = self.cfg
        return TokenLabelHead(
            self.num_features,
            cfg.num_classes,
            cfg.num_heads[-1],
            cfg.mlp_dim(len(cfg.depths) - 1),
            pool_type=cfg.global_pool,
            drop_rate=cfg.drop_rate,
            token_label=cfg.token_label,
        )

    def get_classifier(self) -> Any:
        return (self.head.fc, self.head.aux) if self.cfg.token_label else self.head.fc

    def init_weights(self) -> None:
        super().init_weights()
        init_by_fan_out(self)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: SpectFormerHConfig) -> dict[str, Tensor]:
        """From badripatro/SpectFormers, hierarchical; the vanilla layout is ours."""
        ours = {}
        last = len(cfg.depths)
        for key, value in state.items():
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            # published stages count from 1: the norm behind one stands before the next, the last one's in the head
            key = re.sub(r"^norm(\d)", lambda m: "head.norm" if int(m[1]) == last else f"stages.{m[1]}.downsample.0", key)
            key = re.sub(r"^block(\d)", lambda m: f"stages.{int(m[1]) - 1}.blocks", key)
            key = re.sub(r"^patch_embed(\d)", lambda m: f"stages.{int(m[1]) - 1}.downsample.1", key)
            if key.startswith("head.attention.kv."):
                for name, part in zip("kv", value.chunk(2), strict=True):
                    ours[key.replace(".kv.", f".{name}.")] = part
            else:
                ours[key] = value
        return ours


PUBLISHED = (
    (r"^patch_embed1\.conv\.[036]\.", lambda m: f"stem.conv{int(m[0][-2]) // 3 + 1}.conv."),
    (r"^patch_embed1\.conv\.[147]\.", lambda m: f"stem.conv{int(m[0][-2]) // 3 + 1}.norm."),
    (r"^(patch_embed\d)\.proj\.", r"\1.reduction."),
    (r"^patch_embed1\.", "stem.proj."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^post_network\.0\.attn\.", "head.attention."),
    (r"^post_network\.0\.", "head.attention."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^aux_head\.", "head.aux."),
)


def _vanilla(embed_dim: int, depth: int, drop_path_rate: float = 0.0) -> SpectFormerConfig:
    return SpectFormerConfig(embed_dim=embed_dim, depth=depth, num_heads=embed_dim // 64, drop_path_rate=drop_path_rate)


VANILLA = {
    "spectformer_micro": SpectFormerConfig(
        patch_size=4, embed_dim=64, depth=4, num_heads=2, mlp_ratio=2.0, img_size=32, alpha=2
    ),
    "spectformer_t": _vanilla(256, 12),
    "spectformer_xs": _vanilla(384, 12),
    "spectformer_s": _vanilla(384, 19, 0.15),
    "spectformer_b": _vanilla(512, 19, 0.25),
}

HIERARCHICAL = {
    "spectformer_h_micro": SpectFormerHConfig(
        embed_dim=(16, 32, 64), depths=(2, 1, 1), num_heads=(1, 2, 4), mlp_ratio=4.0, stem_dim=8, img_size=32
    ),
    "spectformer_h_s": SpectFormerHConfig(drop_path_rate=0.1),
    "spectformer_h_b": SpectFormerHConfig(
        embed_dim=(64, 128, 320, 512), depths=(3, 4, 12, 3), num_heads=(2, 4, 10, 16), stem_dim=64, drop_path_rate=0.1
    ),
    "spectformer_h_l": SpectFormerHConfig(
        embed_dim=(96, 192, 384, 512), depths=(3, 6, 18, 3), num_heads=(3, 6, 12, 16), stem_dim=64, drop_path_rate=0.3
    ),
}

register_family(__name__, SpectFormer, VANILLA, first_conv="patch_embed.proj", classifier="head", out_indices=3)
register_family(__name__, SpectFormerH, HIERARCHICAL, first_conv="stem.conv1.conv", classifier=("head.fc", "head.aux"))
