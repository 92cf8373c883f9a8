"""Models of ours with the choices of an instance of timm's: Swin in both versions, MaxViT, ViT and DeiT.

Each function reads the instance, not its name, so that whatever was changed when it was created is kept. A choice that ours
has no word for raises ``UnsaidError``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from timm.layers import GELU, ClassifierHead, DropPath, GELUTanh, Mlp, NormMlpClassifierHead, RelPosBiasTf
from timm.layers import Attention as TimmAttention
from timm.layers import LayerNorm as TimmLayerNorm
from timm.models import maxxvit, vision_transformer
from torch import nn

from vitzoo.models._plain import PlainConfig
from vitzoo.models._timm_layers import uneven
from vitzoo.models.deit import DeiT
from vitzoo.models.maxvit import MaxViT, MaxViTConfig
from vitzoo.models.swin import Swin, SwinConfig
from vitzoo.models.vit import ViT

Value = TypeVar("Value")


class UnsaidError(Exception):
    """The instance has a choice that no config of ours can say."""


def require(said: bool) -> None:
    """Raise ``UnsaidError`` unless ``said``."""
    if not said:
        raise UnsaidError


def one(values: Iterable[Value]) -> Value:
    """The value that all have; raises ``UnsaidError`` where they differ."""
    found = list(values)
    require(bool(found) and all(value == found[0] for value in found))
    return found[0]


def drop_path_of(blocks: list[Any]) -> float:
    """The rate of the last block, to which it rises."""
    rates = [m.drop_prob for m in blocks[-1].modules() if isinstance(m, DropPath)]
    return float(one(rates)) if rates else 0.0


def plain_gelu(act: Any) -> bool:
    """An exact GELU, timm's or PyTorch's."""
    return isinstance(act, nn.GELU | GELU) and getattr(act, "approximate", "none") == "none"


def check_mlps(model: nn.Module, gelu: type[nn.Module] | None = None) -> None:
    """Two linear layers with a GELU between in every MLP."""
    for mlp in (m for m in model.modules() if hasattr(m, "fc1") and hasattr(m, "fc2") and isinstance(m.fc1, nn.Linear)):
        require(type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity))
        require(isinstance(mlp.act, gelu) if gelu else plain_gelu(mlp.act))


def check_norms(model: nn.Module, eps: float) -> None:
    """LayerNorms of one epsilon, with weight and bias."""
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        require(norm.eps == eps and norm.elementwise_affine)


def swin_of(model: Any) -> Swin:
    """Our Swin for timm's, version 1 or 2; windows must divide its maps."""
    stages = [list(layer.blocks) for layer in model.layers]
    blocks = [block for stage in stages for block in stage]
    version = 2 if hasattr(blocks[0].attn, "cpb_mlp") else 1
    windows, pretrained = [], []
    for stage in stages:
        sides = one(tuple(block.window_size) for block in stage)
        require(sides[0] == sides[1])
        windows.append(sides[0])
        for j, block in enumerate(stage):
            require(uneven(block) is None)
            covered = tuple(0 if n <= w else w // 2 for n, w in zip(block.input_resolution, sides, strict=True))
            require(tuple(block.shift_size) == (covered if j % 2 else (0, 0)))
        if version == 2:
            reference = one(tuple(block.attn.pretrained_window_size) for block in stage)
            require(reference[0] == reference[1])
            pretrained.append(int(reference[0]))
    dims = tuple(int(stage[0].norm1.normalized_shape[0]) for stage in stages)
    require(all(block.attn.attn_drop.p == 0 for block in blocks))
    require(all(block.attn.qkv.out_features == 3 * block.norm1.normalized_shape[0] for block in blocks))
    require(isinstance(model.head, ClassifierHead) and isinstance(model.norm, nn.LayerNorm))
    require(isinstance(model.patch_embed.norm, nn.LayerNorm))
    check_mlps(model)
    check_norms(model, 1e-5)
    return Swin(
        SwinConfig(
            embed_dim=dims,
            depths=tuple(len(stage) for stage in stages),
            num_heads=tuple(one(block.attn.num_heads for block in stage) for stage in stages),
            mlp_ratio=tuple(one(block.mlp.fc1.out_features / block.mlp.fc1.in_features for block in stage) for stage in stages),
            qkv_bias=one((block.attn.q_bias if version == 2 else block.attn.qkv.bias) is not None for block in blocks),
            patch_size=int(one(model.patch_embed.patch_size)),
            window_size=tuple(int(side) for side in windows),
            img_size=tuple(model.patch_embed.img_size),
            version=version,
            pretrained_window_sizes=tuple(pretrained) if any(pretrained) else (),
            in_chans=model.in_chans,
            num_classes=model.num_classes,
            global_pool=model.head.global_pool.pool_type,
            drop_rate=model.head.drop.p,
            proj_drop_rate=one(block.attn.proj_drop.p for block in blocks),
            drop_path_rate=drop_path_of(blocks),
        )
    )


def maxvit_of(model: Any) -> MaxViT:
    """Our MaxViT for timm's, where it is of the official flavor: TensorFlow's padding and bias tables."""
    stages = [list(stage.blocks) for stage in model.stages]
    blocks = [block for stage in stages for block in stage]
    require(all(type(b) is maxxvit.MaxxVitBlock and type(b.conv) is maxxvit.MbConvBlock for b in blocks))
    halves = [half for block in blocks for half in (block.attn_block, block.attn_grid)]
    require(all(type(half) is maxxvit.PartitionAttentionCl for half in halves))
    require(all(type(h.attn.rel_pos) is RelPosBiasTf and not h.attn.head_first and h.attn.attn_drop.p == 0 for h in halves))
    require(isinstance(model.head, NormMlpClassifierHead) and isinstance(model.norm, nn.Identity))
    require("Same" in type(model.stem.conv1).__name__)  # TensorFlow's padding
    check_mlps(model, GELUTanh)
    sizes = one(tuple(half.partition_size) for half in halves)
    dims = tuple(int(stage[0].attn_block.norm1.normalized_shape[0]) for stage in stages)
    mlp = halves[0].mlp
    return MaxViT(
        MaxViTConfig(
            embed_dim=dims,
            depths=tuple(len(stage) for stage in stages),
            num_heads=tuple(one(block.attn_block.attn.num_heads for block in stage) for stage in stages),
            mlp_ratio=mlp.fc1.out_features / mlp.fc1.in_features,
            stem_width=int(model.stem.out_chs),
            window_size=(int(sizes[0]), int(sizes[1])),
            expand_ratio=blocks[0].conv.conv2_kxk.out_channels / dims[0],
            se_ratio=blocks[0].conv.se.fc1.out_channels / dims[0],
            head_hidden_size=int(model.head.num_features),
            img_size=tuple(model.img_size),
            in_chans=model.in_chans,
            num_classes=model.num_classes,
            global_pool=model.head.global_pool.pool_type,
            drop_rate=model.drop_rate,
            proj_drop_rate=one(half.attn.proj_drop.p for half in halves),
            drop_path_rate=drop_path_of(blocks),
        )
    )


def plain_of(model: Any) -> ViT | DeiT:
    """Our ViT for timm's, our DeiT where it has a distillation token."""
    distilled = hasattr(model, "dist_token")
    blocks = list(model.blocks)
    require(all(type(block) is vision_transformer.Block and type(block.attn) is TimmAttention for block in blocks))
    attentions = [block.attn for block in blocks]
    require(model.global_pool in ("", "token", "avg") and model.attn_pool is None and model.pos_embed is not None)
    require(model.global_pool != "avg" or not model.pool_include_prefix)
    require(all(a.attn_drop.p == 0 and a.gate is None and isinstance(a.norm, nn.Identity) for a in attentions))
    require(all(a.proj.bias is not None and a.attn_dim == model.embed_dim for a in attentions))
    require(type(model.patch_embed) is vision_transformer.PatchEmbed and isinstance(model.patch_embed.norm, nn.Identity))
    require(isinstance(model.patch_drop, nn.Identity) and model.pos_drop.p == 0)
    normed = [m for m in (model.norm, model.fc_norm) if isinstance(m, nn.LayerNorm)]
    require(len(normed) == 1 and (model.norm_pre is None or isinstance(model.norm_pre, nn.Identity | nn.LayerNorm)))
    check_mlps(model)
    check_norms(model, 1e-6)
    scales = [getattr(block.ls1, "gamma", None) is not None for block in blocks]
    mlp = blocks[0].mlp
    config = PlainConfig(
        patch_size=int(one(model.patch_embed.patch_size)),
        embed_dim=model.embed_dim,
        depth=len(blocks),
        num_heads=one(a.num_heads for a in attentions),
        mlp_ratio=mlp.fc1.out_features / mlp.fc1.in_features,
        qkv_bias=one(a.qkv.bias is not None for a in attentions),
        qk_norm=one(isinstance(a.q_norm, nn.LayerNorm | TimmLayerNorm) for a in attentions),
        init_values=1.0 if one(scales) else None,
        class_token=model.cls_token is not None,
        distilled=distilled,
        reg_tokens=model.num_reg_tokens,
        no_embed_class=model.no_embed_class,
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        fc_norm=not isinstance(model.fc_norm, nn.Identity),
        img_size=tuple(model.patch_embed.img_size),
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        global_pool=model.global_pool,
        drop_rate=model.head_drop.p,
        proj_drop_rate=one(a.proj_drop.p for a in attentions),
        drop_path_rate=drop_path_of(blocks),
    )
    return DeiT(config) if distilled else ViT(config)
