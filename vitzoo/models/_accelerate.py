"""``accelerate``: timm's models with window, grid and global attention through our ops, and the table of what can be.

Where we have the family and can say every choice of the instance, the model is built anew as ours from its weights. Every
other one stays what it is, with the layers exchanged that ours can stand in for (``vitzoo.layers.exchange``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import deit as timm_deit
from timm.models import maxxvit, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn

from vitzoo import checkpoints
from vitzoo.layers import exchangeable, refusal, with_our_attention
from vitzoo.models import _timm_layers, davit, gcvit, twins
from vitzoo.models._contract import Backbone
from vitzoo.models._rebuild import UnsaidError, maxvit_of, plain_of, swin_of

_LAYERS = (_timm_layers, davit, gcvit, twins)  # imported for what they say they stand in for


@dataclass(frozen=True)
class Way:
    """How one kind of model is accelerated.

    Attributes:
        kind: the class of timm's, of a model or of a layer.
        how: "rebuild", or "exchange" of layers.
        by: the class or the function of ours that does it.
    """

    kind: str
    how: str
    by: str


# class of timm's: builds ours for an instance, raising UnsaidError where it has a choice that ours cannot say
REBUILD: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    swin_transformer.SwinTransformer: swin_of,
    swin_transformer_v2.SwinTransformerV2: swin_of,
    maxxvit.MaxxVit: maxvit_of,
    vision_transformer.VisionTransformer: plain_of,
    timm_deit.VisionTransformerDistilled: plain_of,
}


def ways() -> list[Way]:
    """The table: which classes of timm's can be accelerated, and how."""
    rebuilt = [Way(_named(theirs), "rebuild", build.__name__) for theirs, build in REBUILD.items()]
    return rebuilt + [Way(_named(theirs), "exchange", ours.__name__) for theirs, ours in exchangeable().items()]


def _named(cls: type) -> str:
    return f"{cls.__module__.removeprefix('timm.')}.{cls.__name__}"


def accelerate(model: nn.Module, check: bool = True) -> nn.Module:
    """An equal model whose window, grid and global attention goes through our ops.

    Args:
        model: a model of timm's, or any module with such a model or its layers inside: a feature extractor, a detector.
            It is left as it is; the new one has copies of its parameters, its mode and what of it requires gradients.
        check: run both on a random image of the model's own size and compare. Left out where the model is on the meta
            device or does not say its image size.

    Returns:
        Ours, built from the weights, where we have the family (Swin, Swin V2, MaxViT, ViT, DeiT): with maps in NCHW, any
        image size, and the methods that timm's models have. Else a copy with layers exchanged, which is of timm's class
        and keeps the names of its parameters. A model of vitzoo's is returned as it is.

    Raises:
        ValueError: nothing in it can be accelerated, or something in it cannot; the message says why in a sentence.
        RuntimeError: the outputs differ, which is a bug of ours.
    """
    if isinstance(model, Backbone):
        return model
    faster = _rebuilt(model)
    if faster is None:
        faster = with_our_attention(copy.deepcopy(model), on_request=True)
        _demand_exchanges(model, faster)
    if check and not any(p.is_meta for p in model.parameters()):
        _compare(model, faster)
    return faster


def _rebuilt(model: nn.Module) -> nn.Module | None:
    """Ours from the weights of theirs; None where there is no such family or ours cannot say what it chose."""
    build = REBUILD.get(type(model))
    if build is None:
        return None
    like = next(model.parameters())
    try:
        with torch.device("meta"):
            ours = build(model)
        state = checkpoints.convert(model.state_dict(), ours)
        learns = checkpoints.convert({k: torch.full_like(p, p.requires_grad) for k, p in model.named_parameters()}, ours)
        ours.to_empty(device=like.device).to(like.dtype).load_state_dict(state, strict=True)
    except (UnsaidError, KeyError, RuntimeError):  # a choice, or parameters, that ours has not
        return None
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(bool(learns[name].any()))
    for name in ("pretrained_cfg", "default_cfg"):
        if hasattr(model, name):
            setattr(ours, name, getattr(model, name))
    return ours.train(model.training)


def _demand_exchanges(model: nn.Module, faster: nn.Module) -> None:
    """Raise ValueError unless layers were exchanged, and all that are of a kind that can be."""
    kinds = exchangeable()
    left = [m for m in faster.modules() if type(m) in kinds]
    name = type(model).__name__
    if left:
        raise ValueError(f"{name} cannot be accelerated: {refusal(left[0])}")
    exchanged = [m for m in model.modules() if type(m) in kinds]
    if not exchanged:
        known = ", ".join(sorted({way.kind.split(".")[1] for way in ways() if way.kind.startswith("models.")}))
        raise ValueError(
            f"{name} has no attention that vitzoo computes, so there is nothing to accelerate. Models of these can be: {known}."
        )


@torch.no_grad()
def _compare(theirs: nn.Module, ours: nn.Module) -> None:
    size = _image_size(theirs)
    if size is None:
        return
    like = next(theirs.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, int(getattr(theirs, "in_chans", 3)), *size, generator=generator).to(like)
    modes = theirs.training, ours.training
    try:
        expected, got = _outputs(theirs.eval()(image)), _outputs(ours.eval()(image))
    finally:
        theirs.train(modes[0])
        ours.train(modes[1])
    allowed = 1e-4 if like.dtype in (torch.float32, torch.float64) else 0.1
    for a, b in zip(expected, got, strict=True):
        off = float((a - b).abs().max() / a.abs().max().clamp(min=1e-12))
        if a.shape != b.shape or not off <= allowed:
            raise RuntimeError(
                f"The accelerated {type(theirs).__name__} differs from the model by {off:.1e} of its output. Please report it."
            )


def _outputs(output: Any) -> list[Tensor]:
    """Tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _outputs(value)]


def _image_size(model: Any) -> tuple[int, int] | None:
    """Rows and columns that a model of timm's was built for; None where it does not say."""
    for holder in (getattr(model, "patch_embed", None), getattr(model, "model", model)):
        size = getattr(holder, "img_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else (size[0], size[1])
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(cfg, dict):
        return None
    channels, height, width = cfg.get("input_size", (0, 0, 0))
    return (height, width) if channels else None
