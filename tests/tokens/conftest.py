"""Hosts for token reduction: ours and timm's, small, with every kind of prefix, norm, scale and pooling."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vitzoo

TINY: dict[str, Any] = dict(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7)
EVA: dict[str, Any] = dict(img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7)

HOSTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("vit_tiny_patch16_224", TINY),
    "ours, registers and layer scale": ("vit_small_patch14_reg4_dinov2", TINY),
    "ours, distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "ours, query-key norm and drop path": ("vit_tiny_patch16_224", {**TINY, "qk_norm": True, "drop_path_rate": 0.2}),
    "ours, pooled": ("vit_tiny_patch16_224", {**TINY, "global_pool": "avg"}),
    "ours, no prefix": ("vit_tiny_patch16_224", {**TINY, "class_token": False, "global_pool": "avg"}),
    "deit": ("timm:deit_tiny_patch16_224", TINY),
    "deit, distilled": ("timm:deit_tiny_distilled_patch16_224", TINY),
    "deit3": ("timm:deit3_small_patch16_224", TINY),
    "augreg": ("timm:vit_base_patch16_224", TINY),
    "dinov2": ("timm:vit_small_patch14_dinov2", {**TINY, "dynamic_img_size": True}),
    "dinov2 with registers": ("timm:vit_small_patch14_reg4_dinov2", TINY),
    "clip": ("timm:vit_base_patch16_clip_224", TINY),
    "siglip": ("timm:vit_base_patch16_siglip_224", TINY),
    "post-norm": ("timm:vit_relpos_free", TINY),
    "eva": ("timm:eva_giant_patch14_224", {**EVA, "mlp_ratio": 2.0}),
    "eva02": ("timm:eva02_tiny_patch14_224", {**EVA, "mlp_ratio": 2.0}),
}


def host(name: str, **changes: Any) -> nn.Module:
    """A model whose parameters are all off their initial value, in eval mode."""
    model_name, kwargs = HOSTS[name]
    kwargs = {**kwargs, **changes}
    torch.manual_seed(1)
    if name == "post-norm":
        model = timm.models.VisionTransformer(**kwargs, block_fn=timm.models.vision_transformer.ResPostBlock, init_values=0.5)
    elif model_name.startswith("timm:"):
        model = timm.create_model(model_name[5:], **kwargs)
    else:
        model = vitzoo.create_model(model_name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def image(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=HOSTS, scope="module")
def any_host(request: pytest.FixtureRequest) -> nn.Module:
    return host(request.param)
