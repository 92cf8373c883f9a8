"""Grad-CAM. Selvaraju et al. 2017, arXiv:1610.02391, for pyramids and for plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.explain._record import token_grid
from vitzoo.explain.gradients import target_of


def weighed(activation: Tensor, gradient: Tensor) -> Tensor:
    """``relu(sum_c w_c a_c)`` with w the mean gradient of a channel; ``[B, C, h, w]`` twice to ``[B, h, w]``."""
    return (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1).clamp(min=0)


def scaled(cam: Tensor) -> Tensor:
    """Each image from 0 to 1: ``[B, h, w]``, the smallest value away, over the largest that is left (plus 1e-7)."""
    cam = cam - cam.amin(dim=(1, 2), keepdim=True)
    return cam / (1e-7 + cam.amax(dim=(1, 2), keepdim=True))


def default_layer(model: nn.Module) -> str:
    """The first norm of the last block; the last stage, or what timm takes for it, where no block has one.

    Behind the last attention of a class-token model only that token has a gradient, so it is looked at in front of it.

    Args:
        model: any classifier.

    Returns:
        The path of the module.

    Raises:
        ValueError: the model has neither.
    """
    names = dict(model.named_modules())
    norms = [name for name, m in names.items() if name.endswith("norm1") and any(True for _ in m.parameters())]
    if norms:
        return norms[-1]
    stages = [name for name in names if name.startswith("stages.") and name.count(".") == 1]
    features: Any = getattr(model, "feature_info", None) or ()
    known = [info["module"] for info in features if isinstance(info, dict) and info.get("module") in names]
    if not stages and not known:
        raise ValueError(f"{type(model).__name__} has no block with a norm1 and no stages. Name a layer (layers=...).")
    return (stages or known)[-1]


def gradcam(
    model: nn.Module, x: Tensor, target: int | Tensor | None = None, layers: str | Sequence[str] | None = None
) -> Tensor:
    """Where the features of a layer speak for a class.

    Args:
        model: any classifier, timm's too.
        x: images ``[B, C, H, W]``.
        target: a class for all, ``[B]`` classes, or None for the likeliest of each image.
        layers: paths of modules (of ``named_modules``) whose output is looked at; several are scaled, resized to the first
            one's map, averaged and scaled again. None: the first norm of the last block, else the last stage.

    Returns:
        ``[B, h, w]`` from 0 to 1 on the map of the first layer; ``draw`` resizes it to the picture.

    Raises:
        ValueError: there is no such layer or class, or its output is no map.
    """
    names = [default_layer(model)] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            near = [known for known in modules if known.endswith(name.rpartition(".")[2])][:3]
            raise ValueError(
                f"{type(model).__name__} has no layer '{name}'.{' It has: ' + ', '.join(near) + '.' if near else ''}"
            )
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        with torch.enable_grad():
            output = model(x.detach().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    logits = output[0] if isinstance(output, tuple) else output
    chosen = logits.gather(1, target_of(logits, target)[:, None]).sum()
    gradients = torch.autograd.grad(chosen, [seen[name] for name in names])
    maps = [
        scaled(weighed(*(as_map(model, modules[name], t.detach(), x) for t in (seen[name], gradient))))
        for name, gradient in zip(names, gradients, strict=True)
    ]
    if len(maps) == 1:
        return maps[0]
    size = maps[0].shape[1:]
    same = [F.interpolate(m[:, None], size=size, mode="bilinear", align_corners=False)[:, 0] for m in maps]
    return scaled(torch.stack(same).mean(dim=0))


def as_map(model: nn.Module, module: nn.Module, output: Tensor, x: Tensor) -> Tensor:
    """A layer's output as ``[B, C, h, w]``: tokens without their prefix, maps with channels last or first."""
    if output.ndim == 3:
        (height, width), prefix = token_grid(model, x, output.shape[1])
        return output[:, prefix:].transpose(1, 2).unflatten(2, (height, width))
    if output.ndim != 4:
        raise ValueError(f"{type(module).__name__} puts out {list(output.shape)}, which is neither a map nor tokens.")
    return output if _channels_first(model, module, output.shape) else output.permute(0, 3, 1, 2)


def _channels_first(model: nn.Module, module: nn.Module, shape: torch.Size) -> bool:
    """Whether a layer puts out ``[B, C, h, w]``: the axis that is as wide as its parameters tells; if both are, its kind."""
    widths = {p.shape[0] for p in module.parameters() if p.ndim == 1} or {p.shape[0] for p in model.parameters() if p.ndim == 1}
    if (shape[1] in widths) != (shape[3] in widths):
        return shape[1] in widths
    return type(module) is not nn.LayerNorm and not type(module).__module__.startswith("vitzoo.")
