"""AttNet: attentive convolution. arXiv:2510.20092, 2025.

New here: a depthwise convolution whose kernel is computed from the image. Every image and channel has its own, made from means
over nine strips of the map, and part of the kernel's mean is taken off it, so that neighbours compete as they do in a softmax.

Deviations: none in what is computed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial

from timm.layers import LayerNorm2d, NormMlpClassifierHead
from torch import Tensor, nn

from vitzoo.layers import AttentiveConv, Block, ConvNorm, ConvNormStem, DepthwiseConv, Linear, init_truncated
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family


@dataclass(frozen=True)
class AttNetConfig(PyramidConfig):
    """Adds to the pyramid's choices; ``num_heads`` is for other mixers only.

    Attributes:
        mlp_ratio: hidden channels of the MLPs over their width, of which the gate leaves two thirds.
        kernel_sizes: rows and columns of the computed kernels, for each stage.
        mlp_norm: RMS norm of the hidden channels of the MLPs.
    """

    embed_dim: int | tuple[int, ...] = (48, 96, 224, 384)
    num_heads: tuple[int, ...] = (1, 2, 4, 8)
    mlp_ratio: float | tuple[float, ...] = (8, 8, 4, 4)
    layer_scale: float | None = 1e-6
    kernel_sizes: tuple[int, ...] = (3, 3, 3, 3)
    mlp_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.kernel_sizes) != len(self.depths):
            raise ValueError(
                f"kernel_sizes {self.kernel_sizes} names {len(self.kernel_sizes)} stages, depths {len(self.depths)}."
            )


class GatedMlp(nn.Module):
    """``W2 norm(gelu(dw3x3(a)) * v)`` with ``[a, v] = W1 x``: ``[B, H, W, C]``, unchanged."""

    def __init__(self, dim: int, hidden: int, norm: bool, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 2 * hidden)
        self.dwconv = DepthwiseConv(hidden)
        self.act = nn.GELU()
        self.norm = nn.RMSNorm(hidden, eps=1e-6) if norm else nn.Identity()
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        a, v = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(self.norm(self.act(self.dwconv(a)) * v))))


class AttNet(Pyramid):
    """AttNet on the pyramid trunk."""

    Config = AttNetConfig

    cfg: AttNetConfig

    def make_stem(self) -> nn.Module:
        return ConvNormStem(self.cfg.in_chans, self.cfg.dims[0] // 2, self.cfg.dims[0])

    def make_downsample(self, i: int) -> nn.Module:
        return ConvNorm(self.cfg.dims[i - 1], self.cfg.dims[i], stride=2)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: AttentiveConv(self.slot(i, j), size=cfg.kernel_sizes[i])),
            mlp=GatedMlp(cfg.dims[i], 2 * cfg.mlp_dim(i) // 3, cfg.mlp_norm, cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_eps=1e-6,
        )

    def make_norm(self) -> nn.Module:
        return nn.Identity()  # the head has it, behind the pooling

    def make_head(self) -> nn.Module:
        cfg = self.cfg
        norm = partial(LayerNorm2d, eps=1e-5)
        return NormMlpClassifierHead(
            self.num_features, cfg.num_classes, pool_type=cfg.global_pool, drop_rate=cfg.drop_rate, norm_layer=norm
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:  # its norm too: nothing trains it any more
            self.head.reset(0, "", reset_other=True)
        return take

    def init_weights(self) -> None:
        super().init_weights()
        init_truncated(self)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: AttNetConfig) -> dict[str, Tensor]:
        """From price112/Attentive-Convolution."""
        del cfg
        ours = {}
        for key, value in state.items():
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            # what is a linear layer here is a 1x1 convolution there
            ours[key] = value.flatten(1) if re.search(r"(_proj|proj|fc\d)\.weight$", key) else value
        return ours


PUBLISHED = (
    (r"^downsample_layers\.0\.0\.", "stem.conv1."),
    (r"^downsample_layers\.0\.2\.", "stem.conv2."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^(stem\.conv\d|stages\.\d+\.downsample)\.0\.", r"\1.conv."),
    (r"^(stem\.conv\d|stages\.\d+\.downsample)\.1\.", r"\1.norm."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.token_mixer\.", ".attn."),
    (r"\.channel_mixer\.(norm)?(_layer)?", r".mlp.\1"),
    (r"\.layer_scale_(\d)\.", r".ls\1."),
    (r"\.norm_(\d)\.", r".norm\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def _attnet(widths: tuple[int, ...], depths: tuple[int, ...], drop_path_rate: float, large: bool, scale: bool) -> AttNetConfig:
    layer_scale = 1e-6 if scale else None
    return AttNetConfig(embed_dim=widths, depths=depths, layer_scale=layer_scale, mlp_norm=large, drop_path_rate=drop_path_rate)


VARIANTS = {
    "attnet_micro": AttNetConfig(
        embed_dim=(16, 32, 64),
        depths=(2, 1, 1),
        num_heads=(1, 2, 4),
        mlp_ratio=3.0,
        layer_scale=None,
        kernel_sizes=(3, 3, 3),
        img_size=32,
    ),
    "attnet_xxs": _attnet((32, 64, 128, 240), (2, 2, 4, 2), 0.0, large=False, scale=False),
    "attnet_xs": _attnet((40, 80, 160, 320), (2, 2, 7, 2), 0.02, large=False, scale=True),
    "attnet_s": _attnet((40, 80, 160, 320), (2, 3, 10, 3), 0.05, large=False, scale=False),
    "attnet_t1": _attnet((48, 96, 224, 384), (2, 3, 12, 3), 0.1, large=True, scale=True),
    "attnet_t2": _attnet((64, 128, 288, 512), (3, 3, 16, 3), 0.2, large=True, scale=True),
    "attnet_t3": _attnet((72, 144, 320, 576), (4, 4, 26, 4), 0.4, large=True, scale=True),
    "attnet_t4": _attnet((96, 192, 384, 768), (5, 5, 28, 5), 0.5, large=True, scale=True),
}

register_family(__name__, AttNet, VARIANTS, first_conv="stem.conv1.conv")
