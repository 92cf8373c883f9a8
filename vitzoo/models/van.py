"""VAN: visual attention network. Guo et al. 2022, arXiv:2202.09741.

New here: attention without a softmax. A large kernel, taken apart into a depthwise, a dilated depthwise and a 1x1
convolution, computes for every token and channel a weight that multiplies it, so a token sees 21 x 21 others at a cost
that grows linearly with the image.

Deviations: none in what is computed. The maps of ``forward_intermediates`` are those that its authors' dense backbones
return, each behind the norm of its stage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitzoo.layers import BatchNorm, Block, ConvNorm, DepthwiseConv, DepthwiseMlp, Linear, Slot, init_by_fan_out, register_mixer
from vitzoo.models._pyramid import Pyramid, PyramidConfig
from vitzoo.models._registry import register_family


@dataclass(frozen=True)
class VANConfig(PyramidConfig):
    """Chooses nothing that the pyramid does not; ``num_heads`` is for other mixers only."""

    embed_dim: int | tuple[int, ...] = (64, 128, 320, 512)
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratio: float | tuple[float, ...] = (8, 8, 4, 4)
    layer_scale: float | None = 1e-2


@register_mixer("large_kernel")
class LargeKernelAttention(nn.Module):
    """``x + W2(u * conv1x1(dw7x7(dw5x5(u))))`` with ``u = gelu(W1 x)``, the 7x7 kernel dilated by 3; section 3.2.

    The shortcut inside it starts at its own input, which the block has normed.

    Shape: ``[B, H, W, C]``, unchanged.
    """

    def __init__(self, slot: Slot) -> None:
        super().__init__()
        dim = slot.dim
        self.proj1 = Linear(dim, dim)
        self.act = nn.GELU()
        self.near = DepthwiseConv(dim, 5)
        self.far = DepthwiseConv(dim, 7, dilation=3)
        self.mix = Linear(dim, dim)
        self.proj2 = Linear(dim, dim)
        self.proj_drop = nn.Dropout(slot.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        u = self.act(self.proj1(x))
        return x + self.proj_drop(self.proj2(u * self.mix(self.far(self.near(u)))))


class Stem(ConvNorm):
    """A 7x7 convolution of stride 4 and batch norm: ``[B, in_chans, H, W]`` to ``[B, ceil(H / 4), ceil(W / 4), C]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


class VAN(Pyramid):
    """VAN on the pyramid trunk."""

    Config = VANConfig

    cfg: VANConfig

    def make_stem(self) -> nn.Module:
        return Stem(self.cfg.in_chans, self.cfg.dims[0], 7, stride=4, bias=True)

    def make_downsample(self, i: int) -> nn.Module:
        return ConvNorm(self.cfg.dims[i - 1], self.cfg.dims[i], 3, stride=2, bias=True)

    def make_block(self, i: int, j: int, drop_path: float) -> nn.Module:
        cfg = self.cfg
        return Block(
            cfg.dims[i],
            self.mixer(i, j, lambda: LargeKernelAttention(self.slot(i, j))),
            mlp=DepthwiseMlp(cfg.dims[i], cfg.mlp_dim(i), cfg.proj_drop_rate),
            drop_path=drop_path,
            layer_scale=cfg.layer_scale,
            norm_layer=BatchNorm,
        )

    def make_stage_norm(self, i: int) -> nn.Module:
        return nn.LayerNorm(self.cfg.dims[i], eps=1e-6)

    def make_norm(self) -> nn.Module:
        return nn.Identity()

    def init_weights(self) -> None:
        super().init_weights()
        for part in (self.stem, self.stages):
            init_by_fan_out(part, linear=True)

    @classmethod
    def from_published(cls, state: dict[str, Tensor], cfg: VANConfig) -> dict[str, Tensor]:
        """From Visual-Attention-Network/VAN-Classification and the same authors' dense backbone."""
        del cfg
        ours = {}
        for key, value in state.items():
            for pattern, replacement in PUBLISHED:
                key = re.sub(pattern, replacement, key)
            if key.endswith(LINEAR):
                value = value.flatten(1)
            ours[key] = value
        return ours


LINEAR = ("attn.proj1.weight", "attn.mix.weight", "attn.proj2.weight", "mlp.fc1.weight", "mlp.fc2.weight")
"""Our names of what the authors write as a 1x1 convolution."""

PLACES = {"patch_embed": "downsample", "block": "blocks", "norm": "norm"}
"""What of a stage the published names, which count stages from 1, stand for."""

PUBLISHED = (
    (r"^(patch_embed|block|norm)(\d)\.", lambda m: f"stages.{int(m[2]) - 1}.{PLACES[m[1]]}."),
    (r"downsample\.proj\.", "downsample.conv."),
    (r"^stages\.0\.downsample\.", "stem."),
    (r"\.layer_scale_(\d)$", r".ls\1.gamma"),
    (r"\.attn\.proj_(\d)\.", r".attn.proj\1."),
    (r"\.spatial_gating_unit\.conv0\.", ".near."),
    (r"\.spatial_gating_unit\.conv_spatial\.", ".far."),
    (r"\.spatial_gating_unit\.conv1\.", ".mix."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^head\.(?!fc\.)", "head.fc."),
)


def _van(depths: tuple[int, ...], widths: tuple[int, ...] = (64, 128, 320, 512), drop_path_rate: float = 0.1) -> VANConfig:
    return VANConfig(embed_dim=widths, depths=depths, drop_path_rate=drop_path_rate)


VARIANTS: dict[str, Any] = {
    "van_micro": VANConfig(
        embed_dim=(16, 32, 64), depths=(2, 1, 1), num_heads=(1, 2, 4), mlp_ratio=2.0, layer_scale=None, img_size=32
    ),
    "van_b0": _van((3, 3, 5, 2), (32, 64, 160, 256)),
    "van_b1": _van((2, 2, 4, 2)),
    "van_b2": _van((3, 3, 12, 3)),
    "van_b3": _van((3, 5, 27, 3), drop_path_rate=0.2),
    "van_b4": _van((3, 6, 40, 3), drop_path_rate=0.2),
    "van_b5": _van((3, 3, 24, 3), (96, 192, 480, 768), drop_path_rate=0.2),
    "van_b6": _van((6, 6, 90, 6), (96, 192, 384, 768), drop_path_rate=0.2),
}

register_family(__name__, VAN, VARIANTS, first_conv="stem.conv")
