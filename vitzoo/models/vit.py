"""Vision transformer. Dosovitskiy et al. 2021, arXiv:2010.11929; registers: Darcet et al. 2024, arXiv:2309.16588.

New here: an image is a sequence of patches, and a plain transformer encoder reads it. Keys are those of timm's
``VisionTransformer``, so its published weights load as they are, AugReg, DINOv2 and the rest.

Deviations: any image size; it is padded to whole patches and the learned positions are resized to its grid.
"""

from __future__ import annotations

from vitzoo.models._plain import PLAIN_SIZES, Plain, PlainConfig
from vitzoo.models._registry import register_family


class ViT(Plain):
    """A vision transformer on the plain trunk."""


def _dinov2(size: str, registers: int = 0) -> PlainConfig:
    # registers take no position of their own, and their weights expect class-token-free positions
    return PlainConfig(
        **PLAIN_SIZES[size],
        patch_size=14,
        img_size=518,
        init_values=1e-5,
        reg_tokens=registers,
        no_embed_class=registers > 0,
    )


VARIANTS = {
    "vit_micro": PlainConfig(patch_size=4, embed_dim=64, depth=4, num_heads=2, mlp_ratio=2.0, img_size=32),
    **{
        f"vit_{size}_patch{patch}_{img}": PlainConfig(**PLAIN_SIZES[size], patch_size=patch, img_size=img)
        for size, patch, img in (
            ("tiny", 16, 224),
            ("tiny", 16, 384),
            ("small", 32, 224),
            ("small", 32, 384),
            ("small", 16, 224),
            ("small", 16, 384),
            ("small", 8, 224),
            ("base", 32, 224),
            ("base", 32, 384),
            ("base", 16, 224),
            ("base", 16, 384),
            ("base", 8, 224),
            ("large", 32, 384),
            ("large", 16, 224),
            ("large", 16, 384),
        )
    },
    **{f"vit_{size}_patch14_dinov2": _dinov2(size) for size in ("small", "base", "large")},
    **{f"vit_{size}_patch14_reg4_dinov2": _dinov2(size, 4) for size in ("small", "base", "large")},
}

register_family(__name__, ViT, VARIANTS, first_conv="patch_embed.proj", classifier="head", out_indices=3, borrow=True)
