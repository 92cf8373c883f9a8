"""Agent attention in DeiT, PVT, Swin and CSWin. Han et al. 2024, arXiv:2312.08874.

New here: a few agents, queries pooled over a grid, read the whole map and pass on what they read, so a block sees
everything at a cost that grows linearly with the image. It is a mixer, ``vitzoo/layers/agent.py``, and this file only
says which blocks of which host have it: ``create_model("swin_tiny_patch4_window7_224", mixer="agent")`` puts it anywhere.

Deviations from the published code:
- any image size. Bias tables are resized as in the published dense-prediction backbones, which agree with the classifiers
  at the size that those are built for;
- an agent block of Swin or CSWin always sees the whole map. The published windows and stripes cover it at the published
  sizes, and smaller ones have no published weights.
"""

from __future__ import annotations

from typing import Any

from vitzoo.models._registry import derive_family

_TWO: Any = ("agent", "agent", None, None)
"""The published attn_type AABB: agents in the first two stages, the host's own attention in the others."""


def _pyramid(host: str, mixer: Any, drop_path_rate: float, **fields: Any) -> tuple[str, dict[str, Any]]:
    agents = {"agents": (9, 16, 49, 49)}
    return host, {"mixer": mixer, "mixer_args": agents, "drop_path_rate": drop_path_rate, **fields}


def _deit(size: str, drop_path_rate: float, **fields: Any) -> tuple[str, dict[str, Any]]:
    return f"deit_{size}_patch16_224", {"mixer": "agent", "drop_path_rate": drop_path_rate, **fields}


_SWIN = "swin_{}_patch4_window7_224"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "agent_micro": ("swin_micro", {"mixer": ("agent", ("agent", 1), None), "mixer_args": {"agents": (9, 16, 4)}}),
    "agent_deit_tiny": _deit("tiny", 0.0),
    "agent_deit_small": _deit("small", 0.1),
    "agent_deit_small_448": _deit("small", 0.1, img_size=448),
    "agent_deit_base": _deit("base", 0.3, mixer=("agent", 4), mixer_args={"agents": 81}),
    "agent_pvt_tiny": _pyramid("pvt_tiny", "agent", 0.1),
    "agent_pvt_small": _pyramid("pvt_small", "agent", 0.1),
    "agent_pvt_medium": _pyramid("pvt_medium", "agent", 0.3),
    "agent_pvt_medium_256": _pyramid("pvt_medium", "agent", 0.3, img_size=256),
    "agent_pvt_large": _pyramid("pvt_large", "agent", 0.3),
    "agent_swin_tiny": _pyramid(_SWIN.format("tiny"), ("agent", "agent", "agent", None), 0.2),
    "agent_swin_small": _pyramid(_SWIN.format("small"), _TWO, 0.3),
    "agent_swin_small_288": _pyramid(_SWIN.format("small"), _TWO, 0.3, img_size=288, window_size=9),
    "agent_swin_base": _pyramid(_SWIN.format("base"), ("agent", "agent", ("agent", 2), None), 0.5),
    "agent_swin_base_384": _pyramid("swin_base_patch4_window12_384", ("agent", "agent", ("agent", 2), None), 0.5),
    "agent_cswin_tiny": _pyramid("cswin_tiny", _TWO, 0.2, depths=(2, 4, 18, 1)),
    "agent_cswin_small": _pyramid("cswin_small", _TWO, 0.4, depths=(3, 6, 29, 2)),
    "agent_cswin_base": _pyramid("cswin_base", _TWO, 0.5, depths=(3, 6, 29, 2)),
    "agent_cswin_base_384": _pyramid("cswin_base_384", _TWO, 0.7, depths=(3, 6, 29, 2)),
}

_DIRECT = ("agent_swin_small_288", "agent_swin_base_384", "agent_cswin_base_384")
"""Evaluated on pictures that are resized without a crop; the others are squashed to 256 pixels for a crop of 224."""

derive_family(
    __name__,
    {name: variant for name, variant in VARIANTS.items() if name not in _DIRECT},
    data={"crop_mode": "squash", "crop_pct": 0.875},
)
derive_family(
    __name__,
    {name: variant for name, variant in VARIANTS.items() if name in _DIRECT},
    data={"crop_mode": "squash", "crop_pct": 1.0},
)
