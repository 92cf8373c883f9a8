"""What can be asked of a reduced model beside its logits: whole maps, where each patch went, losses of the method.

The first functions take the place of the model's own methods for as long as it is reduced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.models._contract import FeatureGetterNet, feature_take_indices
from vitzoo.tokens._method import grid_of, watching


def forward_intermediates(
    model: Any,
    x: Tensor,
    indices: int | list[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Any:
    """What the blocks put out, as whole maps: every patch has the value of the token that stands for it.

    A patch whose token was dropped keeps the value that it had then.

    Args:
        model: a reduced model.
        x: image ``[B, in_chans, H, W]``.
        indices: which blocks: the last n for an int, all for None; negative ones count from the end.
        return_prefix_tokens: pair every map with its prefix tokens ``[B, prefix, C]``.
        norm: put every output through the final norm.
        stop_early: do not run blocks after the last one asked for.
        output_fmt: "NCHW" or "NLC".
        intermediates_only: return the list alone.
        output_dict: return a dict with timm's keys.
        attn_mask: not supported.
        is_causal: not supported.

    Returns:
        The outputs, or ``(normed tokens, outputs)``; the tokens are those that are left.

    Raises:
        ValueError: another ``output_fmt``, or a mask.
    """
    output_fmt = getattr(output_fmt, "value", output_fmt)
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt is 'NCHW' or 'NLC', got '{output_fmt}'.")
    if attn_mask is not None or is_causal:
        raise ValueError("a model with token reduction takes no attention mask: its tokens change from block to block.")
    method = model.token_reduction
    take, last = feature_take_indices(method.depth, indices)
    with watching(method, take, last if stop_early else method.depth) as watch:
        final = model.forward_features(x)
    count = model.num_prefix_tokens
    prefixes, outputs = [], []
    for i in sorted(take):
        y = model.norm(watch.dense[i]) if norm else watch.dense[i]
        prefix, y = y[:, :count], y[:, count:]
        if output_fmt == "NCHW":
            height, width = grid_of(model, x)
            y = y.reshape(y.shape[0], height, width, y.shape[-1]).permute(0, 3, 1, 2).contiguous()
        prefixes.append(prefix)
        outputs.append(y)
    if output_dict:
        result = {"image_intermediates": outputs}
        result |= {"image_intermediates_prefix": prefixes} if return_prefix_tokens and count else {}
        return result if intermediates_only else {**result, "image_features": final}
    paired: list[Any] = list(zip(outputs, prefixes, strict=True)) if return_prefix_tokens and count else outputs
    return paired if intermediates_only else (final, paired)


def prune_intermediate_layers(model: Any, *args: Any, **kwargs: Any) -> list[int]:
    """As the model's own; the block that is then the last hands tokens to the rest of the model."""
    take = type(model).prune_intermediate_layers(model, *args, **kwargs)
    model.token_reduction.depth = len(model.blocks)
    return take


def extra_loss(model: Any, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
    """What the reduction adds to the loss of the training step whose logits these are; None: nothing."""
    return model.token_reduction.loss(model, images, labels, logits)


def set_epoch(model: Any, epoch: float) -> None:
    """Tell the reduction how far a training is, in epochs (fractions count)."""
    model.token_reduction.epoch = epoch


def backbone_of(model: nn.Module) -> Any:
    """The transformer in a model: itself, or what ``features_only`` wraps."""
    return model.model if isinstance(model, FeatureGetterNet) else model


def is_reduced(model: nn.Module) -> bool:
    """Whether a model has token reduction in it."""
    return "token_reduction" in vars(backbone_of(model))


def follow(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Where every patch is after each block: a picture of what a reduction does.

    Args:
        model: a reduced model.
        images: ``[B, in_chans, H, W]``.

    Returns:
        For each block ``[B, prefix + patches]``: the place, among the tokens that are left, of the one that stands for each
        of the first tokens; -1 where it was dropped.

    Raises:
        ValueError: the model is not reduced.
    """
    target = backbone_of(model)
    if not is_reduced(target):
        raise ValueError("the model is not reduced, so every patch is where it was. vitzoo.tokens.reduce(model, ...) does it.")
    method = target.token_reduction
    with watching(method, range(method.depth), method.depth) as watch:
        target.forward_features(images)
    result = []
    for i in range(method.depth):
        source, dense = watch.sources[i], watch.dense[i]
        own = torch.arange(dense.shape[1], device=dense.device).expand(dense.shape[:2])
        result.append(own if source is None else source)
    return result
