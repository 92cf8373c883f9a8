"""FAN, a fully attentional network. Zhou et al. 2022, arXiv:2204.12451.

New here: channels are mixed by attention too. A query of the whole map says how much each channel of the MLP's output counts.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vitzoo.layers import (
    BatchNorm,
    Block,
    ClassAttention,
    ClassAttentionHead,
    ConvDownsample,
    DeepStem,
    DepthwiseConv,
    Linear,
    Mlp,
    PatchEmbed,
)
from vitzoo.layers.attention import check_heads
from vitzoo.layers.tap import DiverseAttention
from vitzoo.models.tap_adl.robust import Robust, RobustConfig
from vitzoo.ops import attend

for _name in ("attend", "fourier_map"):
    torch.fx.wrap(_name)


@dataclass(frozen=True)
class FANConfig(RobustConfig):
    """Adds ConvNeXt's stages; drop path is the same in all of FAN's blocks.

    Attributes:
        conv_stages: how many of the first stages are ConvNeXt's (the hybrids: 2).
    """

    layer_scale: float | None = 1.0
    global_pool: str = "token"
    conv_stages: int = 0

    def goes_down(self, i: int) -> bool:
        return super().goes_down(i) or 0 < i <= self.conv_stages


def fourier_map(like: Tensor, frequencies: int) -> Tensor:
    """Sines and cosines of rows, then of columns, ``[H, W, 2 * frequencies]``, for a map ``[B, H, W, C]``; El-Nouby 2021."""
    wide = torch.promote_types(like.dtype, torch.float32)
    pairs = torch.arange(frequencies // 2, device=like.device, dtype=wide)
    slow = 10000 ** (2 * pairs / frequencies)
    waves = []
    for n in (like.shape[1], like.shape[2]):
        place = torch.arange(1, n + 1, device=like.device, dtype=wide)[:, None]
        angle = place / (place[-1:] + 1e-6) * 2 * math.pi / slow  # a size as a number would be compiled in
        waves.append(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1))
    rows, cols = waves
    size = (like.shape[1], like.shape[2], frequencies)
    return torch.cat([rows[:, None].expand(size), cols[None].expand(size)], dim=-1).to(like.dtype)


class Positioned(nn.Module):
    """An embedding, and Fourier features of every place through a linear layer added to it."""

    FREQUENCIES = 32

    def __init__(self, embed: nn.Module, dim: int) -> None:
        super().__init__()
        self.embed = embed
        self.positions = Linear(2 * self.FREQUENCIES, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return x + self.positions(fourier_map(x, self.FREQUENCIES))


class Patches(PatchEmbed):
    """Patches of a map ``[B, H, W, C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class ConvNeXtBlock(nn.Module):
    """``x + scale(mlp(norm(dw7x7(x))))``: ``[B, H, W, C]``, unchanged; Liu et al. 2022, arXiv:2201.03545."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv_dw = DepthwiseConv(dim, 7)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.ls = LayerScale(dim, init_values=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ls(self.mlp(self.norm(self.conv_dw(x))))


class ChannelProcessing(nn.Module):
    """``gate * norm(fc2(v + gamma * conv(v)))`` with ``v = fc1(x)``: an MLP whose channels are weighed; FAN, section 3.2.

    A channel's gate, the sigmoid of what a query of the whole map finds in it, times one learned number for each head.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.heads = (num_heads, check_heads(dim, num_heads))
        self.temperature = nn.Parameter(torch.ones(num_heads))
        self.q = Linear(dim, dim)
        self.fc1 = Linear(dim, hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.conv1 = DepthwiseConv(hidden)
        self.norm = BatchNorm(hidden)
        self.conv2 = DepthwiseConv(hidden)
        self.fc2 = Linear(hidden, dim)
        self.norm_v = nn.LayerNorm(dim, eps=1e-6)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).flatten(1, 2).softmax(dim=1).unflatten(-1, self.heads)
        k = x.flatten(1, 2).softmax(dim=1).unflatten(-1, self.heads).mean(dim=-1)
        gate = torch.einsum("blnd,bln->bnd", q, k).sigmoid() * self.temperature[:, None]
        v = self.fc1(x)
        v = v + self.drop(self.gamma * self.conv2(self.norm(F.gelu(self.conv1(v)))))
        return self.norm_v(self.drop(self.fc2(v))) * gate.flatten(1)[:, None, None]


class NormedClassAttention(ClassAttention):
    """Class attention that passes the map on as well: normed tokens are added to it, and what comes of it is normed.

    Shape: class tokens ``[B, P, C]`` and a map's ``[B, L, C]``, both unchanged.
    """

    def forward(self, c: Tensor, x: Tensor) -> Any:
        c = self.norm2(c + self.ls1(self.proj(attend(*self.project(c, x)).flatten(-2))))
        # doubled, as published: the residual starts behind the norm
        return c + self.ls2(self.mlp(c)), 2 * self.norm2(x + self.ls1(self.norm1(x)))


class TwoClassAttentions(nn.ModuleList):
    """One after the other: ``[B, P, C]`` and ``[B, L, C]`` to ``[B, P, C]``."""

    def forward(self, c: Tensor, x: Tensor) -> Tensor:
        for block in self:
            c, x = block(c, x)
        return c


class FANHead(ClassAttentionHead):
    """A learned class token, two class attentions, LayerNorm, classifier."""

    def make_pooling(self) -> None:
        super().make_pooling()
        self.cls_token: Any = None
        if self.pool_type:
            kwargs: Any = {"layer_scale": self.layer_scale, "norm_eps": self.norm_eps}
            blocks = (NormedClassAttention(self.num_features, self.num_heads, self.hidden, **kwargs) for _ in range(2))
            self.attention: Any = TwoClassAttentions(blocks)
            self.cls_token = nn.Parameter(torch.empty(1, 1, self.num_features))
            self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal 0.02 for the class token."""
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def classes(self, x: Tensor) -> Tensor:
        return self.cls_token.repeat(x.shape[0], 1, 1)  # a copy: PyTorch's FLOP counter cannot follow a view of a parameter


class FAN(Robust):
    """FAN, of FAN blocks alone or behind two stages of ConvNeXt, on the pyramid trunk."""

    Config = FANConfig

    cfg: FANConfig

    def make_stem(self) -> nn.Module:
        cfg, dim = self.cfg, self.cfg.dims[0]
        if cfg.conv_stages:
            return nn.Sequential(PatchEmbed(dim, cfg.patch_size, cfg.in_chans), nn.LayerNorm(dim, eps=1e-6))
        halvings = range(cfg.patch_size.bit_length() - 2, -1, -1)
        widths = [dim // 4, dim] if cfg.patch_size == 4 else [dim >> i for i in halvings]
        return Positioned(DeepStem(cfg.in_chans, widths, [2] * len(widths)), dim)

    def make_downsample(self, i: int) -> nn.Module:
        cfg, (before, dim) = self.cfg, self.cfg.dims[i - 1 : i + 1]
        if i < cfg.conv_stages:
            return nn.Sequential(nn.LayerNorm(before, eps=1e-6), Patches(dim, 2, before))
        if i == cfg.conv_stages:
            return Positioned(Patches(dim, 2, before), dim)
        return ConvDownsample(before, dim, bias=True) if cfg.goes_down(i) else nn.Identity()

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg, dim, heads = self.cfg, self.cfg.dims[i], self.cfg.num_heads[i]
        if i < cfg.conv_stages:
            return ConvNeXtBlock(dim)
        attention = partial(DiverseAttention, dim, heads, packed=False, qkv_bias=cfg.qkv_bias, proj_drop=cfg.proj_drop_rate)
        mlp = ChannelProcessing(dim, heads, cfg.mlp_dim(i), cfg.proj_drop_rate)
        block = Block(dim, self.mixer(i, j, attention), mlp=mlp, layer_scale=cfg.layer_scale, norm_eps=1e-6)
        if cfg.drop_path_rate:
            block.drop_path1, block.drop_path2 = DropPath(cfg.drop_path_rate), DropPath(cfg.drop_path_rate)
        return self.pooled(i, block)

    def make_norm(self) -> nn.Module:
        return nn.Identity()  # the head has it, behind the class attention

    def make_head(self) -> nn.Module:
        cfg, pool, drop = self.cfg, self.cfg.global_pool, self.cfg.drop_rate
        kwargs: Any = {"pool_type": pool, "drop_rate": drop, "layer_scale": cfg.layer_scale}
        return FANHead(self.num_features, cfg.num_classes, cfg.num_heads[-1], cfg.mlp_dim(-1), **kwargs)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: FANConfig) -> dict[str, Tensor]:
        """From guoyongcs/TAPADL, TAPADL_FAN."""
        first = cfg.conv_stages
        ours = {}
        for key, value in state.items():
            block = re.match(r"blocks\.(\d+)\.(downsample\.)?", key)
            if block:
                stage, index = cfg.place(int(block[1]), first)
                # the last block before a smaller map has the way down, here the stage behind it
                place = f"stages.{stage + 1}.downsample." if block[2] else f"stages.{stage}.blocks.{index}."
                key = place + key[block.end() :]
            for pattern, replacement in PUBLISHED_FAN:
                key = re.sub(pattern, replacement, key)
            key = key.replace("ENTRY.", f"stages.{first}.downsample." if first else "stem.")
            if key.endswith((".temperature", "positions.weight")) or re.search(r"\.mlp\.fc\d\.weight$", key):
                value = value.flatten(0 if key.endswith("temperature") else 1)
            ours[key] = value
        return ours


PUBLISHED_FAN = (
    (r"^patch_embed\.proj\.(\d)\.0\.", r"stem.embed.\1.conv."),
    (r"^patch_embed\.proj\.(\d)\.1\.", r"stem.embed.\1.norm."),
    (r"^patch_embed\.backbone\.stem\.0\.", "stem.0.proj."),
    (r"^patch_embed\.backbone\.stem\.", "stem."),
    (r"^patch_embed\.backbone\.(stages\.\d\.downsample\.1\.)", r"\1proj."),
    (r"^patch_embed\.backbone\.", ""),
    (r"^patch_embed\.", "ENTRY.embed."),
    (r"^pos_embed\.token_projection\.", "ENTRY.positions."),
    (r"^(stages\.\d\.downsample)\.proj\.", r"\1.reduction."),
    (r"\.mlp\.mlp_v\.(dwconv\.)?", ".mlp."),
    (r"\.mlp\.bn\.", ".mlp.norm."),
    (r"\.dilation_predictor\.", ".norm1.predictor."),
    (r"^cls_attn_blocks\.(\d)\.(attn\.)?", r"head.attention.\1."),
    (r"\.gamma(\d)$", r".ls\1.gamma"),
    (r"(\.blocks\.\d+)\.gamma$", r"\1.ls.gamma"),
    (r"^cls_token$", "head.cls_token"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
