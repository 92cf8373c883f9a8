"""FFNet: a convolutional mixer in the shape of a transformer. Yun et al. 2024, arXiv:2406.02021.

New here: attention's place taken by a feed-forward network on the map, "FFNified" attention. Queries meet keys in one
depthwise convolution of a large kernel and values in another, and a GELU stands where the softmax stood.

Deviations: none in what is computed. The two parallel branches of a large kernel are kept apart, as in training; published
parameter counts and multiply-adds are of fused models, a little smaller. Squeeze and excite, which no published model has,
is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from vitzoo.layers import (
    BatchNorm,
    Block,
    ConvNorm,
    ConvNormStem,
    FFNifiedAttention,
    LargeKernel,
    Linear,
    Mlp,
    init_truncated,
)
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family


@dataclass(frozen=True)
class FFNetConfig(PyramidConfig):
    """Adds to the pyramid's choices; ``num_heads`` is for other mixers only.

    Attributes:
        stem_dim: channels between the stem's two convolutions.
        token_kernels: rows and columns of the kernels of keys and values, for each stage.
        channel_kernels: rows and columns of the convolution before each MLP, for each stage.
    """

    embed_dim: int | tuple[int, ...] = 80
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    mlp_ratio: float | tuple[float, ...] = 3.0
    stem_dim: int = 64
    token_kernels: tuple[int, ...] = (3, 3, 7, 7)
    channel_kernels: tuple[int, ...] = (7, 7, 7, 7)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("token_kernels", self.token_kernels), ("channel_kernels", self.channel_kernels)):
            if len(value) != len(self.depths):
                raise ValueError(f"{name} {value} names {len(value)} stages, depths {self.depths} {len(self.depths)}.")


class ConvMlp(Mlp):
    """An MLP behind a depthwise convolution with batch norm: ``[B, H, W, C]``, unchanged."""

    def __init__(self, dim: int, hidden: int, size: int, drop: float = 0.0) -> None:
        super().__init__(dim, hidden, drop)
        self.dwconv = LargeKernel(dim, dim, size) if size > 3 else ConvNorm(dim, dim, size, groups=dim)

    def hidden(self, x: Tensor) -> Tensor:
        return self.fc1(self.dwconv(x))


class Downsample(nn.Module):
    """A large kernel of stride 2, then ``x + W bn(x)``: ``[B, H, W, dim]`` to ``[B, ceil(H / 2), ceil(W / 2), out_dim]``."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = LargeKernel(dim, out_dim, 7, stride=2)
        self.norm = BatchNorm(out_dim)
        self.proj = Linear(out_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduction(x)
        return x + self.proj(self.norm(x))


class FFNet(Pyramid):
    """FFNet on the pyramid trunk."""

    Config = FFNetConfig

    cfg: FFNetConfig

    def make_stem(self) -> nn.Module:
        return ConvNormStem(self.cfg.in_chans, self.cfg.stem_dim, self.cfg.dims[0])

    def make_downsample(self, i: int) -> nn.Module:
        return Downsample(self.cfg.dims[i - 1], self.cfg.dims[i])

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: FFNifiedAttention(self.slot(i, j), size=cfg.token_kernels[i])),
            mlp=ConvMlp(cfg.dims[i], cfg.mlp_dim(i), cfg.channel_kernels[i], cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_layer=lambda dim: nn.Identity(),
        )

    def make_norm(self) -> nn.Module:
        return BatchNorm(self.num_features)

    def init_weights(self) -> None:
        super().init_weights()
        init_truncated(self)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: FFNetConfig) -> dict[str, Tensor]:
        """From ysj9909/FFNet, not fused."""
        del cfg
        ours = {}
        for key, value in state.items():
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            ours[key] = value.flatten(1) if key.endswith(LINEAR) else value.flatten() if key.endswith(".gamma") else value
        return ours


LINEAR = ("mlp.fc1.weight", "mlp.fc2.weight", "downsample.proj.weight")
"""Our names of what the authors write as a 1x1 convolution."""

PUBLISHED = (
    (r"\.c\.weight$", ".conv.weight"),
    (r"\.bn\.", ".norm."),
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.conv2."),
    # the first entry of a stage goes down, except in the first stage
    (r"^stages\.([1-9])\.0\.", r"stages.\1.downsample."),
    (r"^stages\.([1-9])\.(\d+)\.", lambda m: f"stages.{m[1]}.blocks.{int(m[2]) - 1}."),
    (r"^stages\.0\.(\d+)\.", r"stages.0.blocks.\1."),
    (r"\.downsample\.proj\.1\.conv\.norm\.", ".downsample.norm."),
    (r"\.downsample\.proj\.1\.conv\.conv\.", ".downsample.proj."),
    (r"\.downsample\.proj\.0\.", ".downsample.reduction."),
    (r"\.token_mixer\.0\.main\.fc\.", ".attn.query."),
    (r"\.token_mixer\.0\.main\.conv1\.", ".attn.keys."),
    (r"\.token_mixer\.0\.main\.conv2\.", ".attn.values."),
    (r"\.token_mixer\.0\.layer_scale$", ".ls1.gamma"),
    (r"\.channel_mixer\.main\.conv\.", ".mlp.dwconv."),
    (r"\.channel_mixer\.main\.", ".mlp."),
    (r"\.channel_mixer\.layer_scale$", ".ls2.gamma"),
    (r"(reduction|keys|values|dwconv)\.conv\.(conv|norm)\.", r"\1.large.\2."),
    (r"(reduction|keys|values|dwconv)\.conv1\.(conv|norm)\.", r"\1.small.\2."),
    (r"^head\.(?!fc\.)", "head.fc."),
)


def _ffnet(size: int, drop_path_rate: float, img_size: int = 256) -> FFNetConfig:
    embed_dim, depths = {1: (80, (2, 2, 8, 2)), 2: (88, (3, 3, 15, 3)), 3: (96, (4, 4, 22, 5)), 4: (128, (4, 4, 27, 3))}[size]
    return FFNetConfig(
        embed_dim=embed_dim,
        depths=depths,
        channel_kernels=(3, 3, 3, 3) if size == 1 else (7, 7, 7, 7),
        layer_scale=1e-6 if size > 2 else None,
        img_size=img_size,
        drop_path_rate=drop_path_rate,
    )


_MICRO = FFNetConfig(
    embed_dim=16,
    depths=(2, 1, 1),
    num_heads=(1, 2, 4),
    stem_dim=8,
    token_kernels=(3, 3, 7),
    channel_kernels=(3, 3, 7),
    img_size=32,
)

VARIANTS = {
    "ffnet_micro": _MICRO,
    "ffnet_1": _ffnet(1, 0.1),
    "ffnet_1_dist": _ffnet(1, 0.02),
    "ffnet_2": _ffnet(2, 0.15),
    "ffnet_2_dist": _ffnet(2, 0.08),
    "ffnet_3": _ffnet(3, 0.35),
    "ffnet_3_dist": _ffnet(3, 0.2),
    "ffnet_3_384": _ffnet(3, 0.4, 384),
    "ffnet_4_384": _ffnet(4, 0.5, 384),
}

register_family(__name__, FFNet, VARIANTS, first_conv="stem.conv1.conv")
