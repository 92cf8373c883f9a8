"""DeiT and DeiT III. Touvron et al. 2021, arXiv:2012.12877; Touvron et al. 2022, arXiv:2204.07118.

New here: a vision transformer that learns from ImageNet alone, by its recipe and by a distillation token that copies a
convolutional teacher through a head of its own. DeiT III adds layer scale and a simpler, stronger recipe.

Keys are those of timm's ``VisionTransformerDistilled`` and ``VisionTransformer``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitzoo.models._plain import PLAIN_SIZES, Plain, PlainConfig
from vitzoo.models._registry import register_family


class DeiT(Plain):
    """A vision transformer, with a second token and head where ``distilled``.

    With the second head the output is the mean of both; in training, after ``set_distilled_training(True)``, it is the
    pair ``(class logits, distillation logits)``.
    """

    def __init__(self, cfg: PlainConfig | None = None, **overrides: Any) -> None:
        self.distilled_training = False
        super().__init__(cfg, **overrides)
        if self.cfg.distilled:
            self.head_dist = self.make_head(self.num_classes)
            self.init_weights()

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return both heads' logits in training, for a distillation loss."""
        self.distilled_training = enable

    def get_classifier(self) -> Any:
        return (self.head, self.head_dist) if self.cfg.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        if self.cfg.distilled:
            weight = self.pos_embed
            self.head_dist = self.make_head(num_classes).to(weight.device, weight.dtype).train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """As for a ViT; with a distillation token the mean over both tokens or heads."""
        if not self.cfg.distilled or self.global_pool != "token":
            return super().forward_head(x, pre_logits)
        cls, dist = x[:, 0], x[:, 1]
        if pre_logits:
            return (cls + dist) / 2
        logits, dist_logits = self.head(self.head_drop(cls)), self.head_dist(self.head_drop(dist))
        if self.distilled_training and self.training:
            return logits, dist_logits
        return (logits + dist_logits) / 2


VARIANTS = {
    **{f"deit_{size}_patch16_224": PlainConfig(**PLAIN_SIZES[size]) for size in ("tiny", "small", "base")},
    "deit_base_patch16_384": PlainConfig(**PLAIN_SIZES["base"], img_size=384),
    **{
        f"deit_{size}_distilled_patch16_224": PlainConfig(**PLAIN_SIZES[size], distilled=True)
        for size in ("tiny", "small", "base")
    },
    "deit_base_distilled_patch16_384": PlainConfig(**PLAIN_SIZES["base"], distilled=True, img_size=384),
    **{
        f"deit3_{size}_patch16_{img}": PlainConfig(**PLAIN_SIZES[size], img_size=img, init_values=1e-6, no_embed_class=True)
        for size, img in (
            ("small", 224),
            ("small", 384),
            ("medium", 224),
            ("base", 224),
            ("base", 384),
            ("large", 224),
            ("large", 384),
        )
    },
}

register_family(__name__, DeiT, VARIANTS, first_conv="patch_embed.proj", classifier="head", out_indices=3, borrow=True)
