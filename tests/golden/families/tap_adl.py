"""FAN and RVT with TAP, from the arguments of the published classes; also what their blocks attend to, pool by, and lose."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, load, renamed
from vitzoo.layers.tap import DilationPredictor, DiverseAttention, listen
from vitzoo.models.tap_adl.fan import FAN
from vitzoo.models.tap_adl.rvt import RVT

FAN_ARGUMENTS = {
    **{name: name for name in ("img_size", "in_chans", "num_classes", "mlp_ratio", "qkv_bias", "num_scales")},
    "eta": "layer_scale",
    **dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads", "channel_dims", "c_head_num", "backbone")),
    **dict.fromkeys(("tokens_norm", "sr_ratio", "cls_attn_layers", "se_mlp", "hybrid_patch_size", "use_pos_embed")),
}
RVT_ARGUMENTS = {
    "image_size": "img_size",
    **{name: name for name in ("patch_size", "in_chans", "mlp_ratio", "num_classes", "num_scales")},
    **dict.fromkeys(("stride", "base_dims", "depth", "heads", "use_mask", "masked_block", "backbone")),
}


def fan(golden: Golden) -> FAN:
    """The published class cut into stages of one width, behind the ConvNeXt stages that its weights show."""
    published = golden.kwargs
    assert published["tokens_norm"]
    assert published.get("cls_attn_layers", 2) == 2
    assert not published.get("se_mlp")
    depth = published["depth"]
    widths = published.get("channel_dims") or [published["embed_dim"]] * depth
    heads = published["num_heads"]
    heads = heads if isinstance(heads, list) else [heads] * depth
    stages = [(dim, n, len(list(blocks))) for (dim, n), blocks in groupby(zip(widths, heads, strict=True))]
    conv = conv_stages(golden.below("state/patch_embed.backbone.stages."))
    dims, counts, depths = zip(*[(dim, 1, blocks) for dim, blocks in conv], *stages, strict=True)
    return FAN(
        **renamed(published, FAN_ARGUMENTS),
        patch_size=4 if conv else published["patch_size"],
        conv_stages=len(conv),
        embed_dim=dims,
        num_heads=counts,
        depths=depths,
    )


def conv_stages(state: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Channels and blocks of each ConvNeXt stage."""
    norms = {tuple(key.split(".")[:3:2]): len(value) for key, value in state.items() if key.endswith(".norm.weight")}
    stages = sorted({stage for stage, _ in norms})
    return [(norms[stage, "0"], sum(s == stage for s, _ in norms)) for stage in stages]


def rvt(golden: Golden) -> RVT:
    published = golden.kwargs
    heads = published["heads"]
    return RVT(
        **renamed(published, RVT_ARGUMENTS),
        embed_dim=tuple(dim * n for dim, n in zip(published["base_dims"], heads, strict=True)),
        num_heads=heads,
        depths=published["depth"],
        factor_blocks=published["masked_block"] if published.get("use_mask") else 0,
        corner=True,
    )


def check(golden: Golden) -> list[Pair]:
    model = (rvt if golden.published_class.endswith("PoolingTransformer") else fan)(golden)
    ours = ("output", "feature/", "grad/", *GIVEN)
    whole = Golden(golden.spec, {name: value for name, value in golden.tensors.items() if name.startswith(ours)})
    pairs = [*compare_model(whole, model)]
    seen = watched(load(model, golden.below("state/")), golden.tensors["input"])
    pairs += [Pair(name, seen[name], value) for name, value in golden.tensors.items() if name in seen]
    return judge(golden, pairs, MODELS, GIVEN)


def watched(model: Any, image: Tensor) -> dict[str, Tensor]:
    """Attention, shares of the neighbourhoods and the diversification loss, under the files' names."""
    shares: list[Tensor] = []
    maps: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, DilationPredictor):
            module.register_forward_hook(lambda module, args, out: shares.append(out.permute(0, 2, 3, 1)[:, None]))
    model.head.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    with torch.no_grad():
        listen(model, True)
        model(image)
        kept = [m.scores(*m.kept).softmax(dim=-1) for m in model.modules() if isinstance(m, DiverseAttention)]
        loss = model.extra_loss(image, image, image).view(1)
    seen = {f"attn/{i}": attention for i, attention in enumerate(kept)} | {
        "adl": loss,
        "adl_loss": loss,
        "tokens/last": maps[0],
    }
    return seen | {f"{name}/{i}": share for name in ("scale", "pred_scale") for i, share in enumerate(shares)}
