"""FLatten Transformer: focused linear attention in Swin, PVT, PVT v2, CSWin and DeiT. Han et al. 2023, arXiv:2308.00442.

New here: attention without a softmax, at a cost that grows linearly with the image. Its features are focused, turned
towards their largest channels, which makes its weights as sharp as a softmax's, and a depthwise convolution of the values
gives back the variety that products of low rank lack. It is a mixer, ``vitzoo/layers/linear_attention.py``, and this file
only says which blocks of which host have it: ``create_model("swin_tiny_patch4_window7_224", mixer="focused_linear")`` puts
it anywhere.

Deviations from the published code:
- any image size. The learned positions are resized to the map at hand, where the published code fails, or in Swin cuts
  the map into windows of the construction size;
- the PVT hosts keep the last norm that lies in the published files, and as published nothing passes through it;
- where v comes from a reduced map (``kv_ratio``, 1 in every published model), a map that it does not divide is padded;
- ``flatten_deit_*`` is what the paper describes; its code and weights were not published, so no number of it is claimed.
  The class token is a query and a key like all others, positions and convolution are for patches.
"""

from __future__ import annotations

from typing import Any

from vitzoo.models._registry import derive_family

_TWO: Any = {"mixer": ("focused_linear", "focused_linear", None, None)}
"""The published attn_type LLSS: linear in the first two stages, the host's own attention in the others."""


def _all(drop_path_rate: float) -> dict[str, Any]:
    return {"mixer": "focused_linear", "drop_path_rate": drop_path_rate}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "flatten_micro": ("swin_micro", {"mixer": ("focused_linear", ("focused_linear", 1), None)}),
    "flatten_deit_tiny": ("deit_tiny_patch16_224", _all(0.0)),
    "flatten_deit_small": ("deit_small_patch16_224", _all(0.1)),
    "flatten_deit_base": ("deit_base_patch16_224", _all(0.3)),
    "flatten_pvt_tiny": ("pvt_tiny", {**_all(0.1), "idle_norm": True}),
    "flatten_pvt_small": ("pvt_small", {**_all(0.1), "idle_norm": True}),
    "flatten_pvt_medium": ("pvt_medium", {**_all(0.3), "idle_norm": True}),
    "flatten_pvt_large": ("pvt_large", {**_all(0.3), "idle_norm": True}),
    "flatten_pvt_v2_b0": ("pvt_v2_b0", _all(0.1)),
    "flatten_pvt_v2_b1": ("pvt_v2_b1", _all(0.1)),
    "flatten_pvt_v2_b2": ("pvt_v2_b2", _all(0.1)),
    "flatten_pvt_v2_b3": ("pvt_v2_b3", _all(0.3)),
    "flatten_pvt_v2_b4": ("pvt_v2_b4", _all(0.3)),
    "flatten_pvt_v2_b5": ("pvt_v2_b5", _all(0.3)),
    "flatten_swin_tiny": ("swin_tiny_patch4_window7_224", _TWO),
    "flatten_swin_small": ("swin_small_patch4_window7_224", _TWO),
    "flatten_swin_base": ("swin_base_patch4_window7_224", _TWO),
    "flatten_swin_base_384": ("swin_base_patch4_window12_384", _TWO),
    "flatten_cswin_tiny": ("cswin_tiny", {**_TWO, "depths": (2, 4, 18, 1)}),
    "flatten_cswin_small": ("cswin_small", _TWO),
    "flatten_cswin_base": ("cswin_base", {**_TWO, "depths": (3, 6, 29, 2)}),
    "flatten_cswin_base_384": ("cswin_base_384", {**_TWO, "depths": (3, 6, 29, 2), "drop_path_rate": 0.7}),
}

# evaluated as published: squashed to a square, of 256 pixels for a crop of 224
derive_family(
    __name__,
    {name: variant for name, variant in VARIANTS.items() if not name.endswith("_384")},
    data={"crop_mode": "squash", "crop_pct": 0.875},
)
derive_family(
    __name__, {name: variant for name, variant in VARIANTS.items() if name.endswith("_384")}, data={"crop_mode": "squash"}
)
