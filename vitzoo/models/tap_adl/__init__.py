"""FAN and RVT with token-aware average pooling and attention diversification. Guo et al. 2023, arXiv:2303.11126.

New here: before it attends every token chooses how wide a neighbourhood it is averaged over, and a loss drives apart what
tokens attend to, so that damage to a few of them does not decide (``layers/tap.py``). ``fan`` and ``rvt`` hold the two hosts.

Deviations from the published code:
- any image size; published are squares. RVT's factors are resized to the map; ``corner`` takes the first rows and columns of
  their table where a map has fewer tokens, as published;
- a column of one width is written as stages of one width, so that features come from several depths;
- the loss is computed where a task asks for it, from queries and keys that attention has kept in training.
"""

from __future__ import annotations

from vitzoo.models._registry import register_family
from vitzoo.models.tap_adl.fan import FAN, FANConfig
from vitzoo.models.tap_adl.rvt import RVT, RVTConfig

_Shape = tuple[int, tuple[int, ...], tuple[int, ...]]  # channels of a head; heads and depths of the stages


def _fan(dim: int, depth: int, heads: int) -> FANConfig:
    return FANConfig(embed_dim=(dim,) * 3, depths=(depth // 3,) * 3, num_heads=(heads,) * 3)


def _hybrid(dims: tuple[int, ...], depths: tuple[int, ...], heads: tuple[int, ...]) -> FANConfig:
    return FANConfig(embed_dim=(128, 256, *dims), depths=depths, num_heads=(4, 8, *heads), conv_stages=2, patch_size=4)


def _rvt(shape: _Shape, factor_blocks: int = 0) -> RVTConfig:
    head_dim, heads, depths = shape
    return RVTConfig(embed_dim=tuple(head_dim * n for n in heads), depths=depths, num_heads=heads, factor_blocks=factor_blocks)


_TINY: _Shape = (32, (6, 6, 12), (5, 5, 2))
_SMALL: _Shape = (64, (6, 6, 6), (4, 4, 4))
_BASE: _Shape = (64, (12, 12, 12), (4, 4, 4))

CONVOLVED = {
    "tap_fan_micro": FANConfig(
        embed_dim=(32, 32, 48), depths=(1, 1, 1), num_heads=(2, 2, 4), mlp_ratio=2.0, patch_size=4, img_size=32
    ),
    "tap_fan_tiny_12_p16_224": _fan(192, 12, 4),
    "tap_fan_small_12_p16_224": _fan(384, 12, 8),
    "tap_fan_base_18_p16_224": _fan(448, 18, 8),
    "tap_fan_large_24_p16_224": _fan(480, 24, 10),
}

HYBRID = {
    "tap_fan_tiny_8_p4_hybrid": _hybrid((192,), (3, 3, 8), (8,)),
    "tap_fan_small_12_p4_hybrid": _hybrid((384,), (3, 3, 10), (8,)),
    "tap_fan_base_16_p4_hybrid": _hybrid((448,), (3, 3, 16), (8,)),
    "tap_fan_large_16_p4_hybrid": _hybrid((480,), (3, 5, 22), (10,)),
    "tap_fan_xlarge_16_p4_hybrid": _hybrid((528, 768), (3, 7, 20, 3), (11, 16)),
}

RVTS = {
    "tap_rvt_micro": RVTConfig(
        embed_dim=(24, 24, 48),
        depths=(1, 1, 1),
        num_heads=(2, 2, 4),
        mlp_ratio=2.0,
        patch_size=4,
        factor_blocks=1,
        factor_grid=(8, 8),
        img_size=32,
    ),
    "tap_rvt_tiny": _rvt(_TINY),
    "tap_rvt_tiny_plus": _rvt(_TINY, factor_blocks=10),
    "tap_rvt_small": _rvt(_SMALL),
    "tap_rvt_small_plus": _rvt(_SMALL, factor_blocks=5),
    "tap_rvt_base": _rvt(_BASE),
    "tap_rvt_base_plus": _rvt(_BASE, factor_blocks=5),
}

# the same models under names that say how many neighbourhoods there are
SCALES = ("tap_fan_tiny_12_p16_224", "tap_fan_small_12_p16_224", "tap_fan_base_18_p16_224", "tap_fan_large_24_p16_224")
CONVOLVED |= {f"{name}_k4": CONVOLVED[name] for name in SCALES}
HYBRID |= {"tap_fan_base_16_p4_hybrid_k4": HYBRID["tap_fan_base_16_p4_hybrid"]}

register_family(__name__, FAN, CONVOLVED, first_conv="stem.embed.0.conv")
register_family(__name__, FAN, HYBRID, first_conv="stem.0.proj")
register_family(__name__, RVT, RVTS, first_conv="stem.conv")
