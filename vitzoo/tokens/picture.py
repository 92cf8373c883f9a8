"""What became of each patch, drawn on the picture: one panel for every block, merged patches alike, dropped ones grey."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vitzoo.tokens._method import grid_of
from vitzoo.tokens._outputs import backbone_of, follow

if TYPE_CHECKING:
    from PIL import Image

GAP, TITLE, LEAST = 6, 14, 168
"""Pixels between panels, above each for its title, and on the shorter side of each at least."""


@torch.no_grad()
def token_groups(model: nn.Module, images: Tensor) -> Tensor:
    """Which token stands for each patch after each block.

    Args:
        model: a reduced model; left in the mode that it is in.
        images: ``[B, in_chans, H, W]``.

    Returns:
        ``[B, depth, h, w]``, int64: patches of one number are one token; -1 where the patch was dropped.

    Raises:
        ValueError: the model is not reduced.
    """
    target = backbone_of(model)
    sources = torch.stack(follow(model, images), dim=1)
    return sources[..., target.num_prefix_tokens :].unflatten(-1, grid_of(target, images))


def draw_tokens(
    model: nn.Module,
    image: Tensor,
    *,
    blocks: Sequence[int] | None = None,
    columns: int = 4,
    path: str | Path | None = None,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Image.Image:
    """A picture of what a reduction does to an image, block by block.

    Patches that have merged are washed in one colour, each group in its own, with a border around them. Dropped patches are
    grey and dark. A patch that is a token of its own looks as in the image.

    Args:
        model: a reduced model.
        image: as the model is given it, ``[C, H, W]`` or ``[1, C, H, W]``, normalised; C is 3.
        blocks: which to draw, counted from 0 or from the end; None: all.
        columns: panels side by side.
        path: write it here; PNG and whatever else Pillow knows by the ending.
        mean: what the image was normalised with.
        std: likewise.

    Returns:
        An RGB picture.

    Raises:
        ValueError: the model is not reduced, the image has another shape, or there is no such block.
    """
    from PIL import Image, ImageDraw

    image = image[0] if image.ndim == 4 and len(image) == 1 else image
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"draw_tokens takes one image [3, H, W], got {list(image.shape)}. Draw those of a batch one by one.")
    groups = token_groups(model, image[None])[0].cpu()
    chosen = list(range(len(groups)) if blocks is None else blocks)
    for block in chosen:
        if not -len(groups) <= block < len(groups):
            raise ValueError(f"block {block} is to be drawn, and the model has blocks 0 to {len(groups) - 1}.")
    shown = _unnormalised(image, mean, std)
    height, width = shown.shape[1:]
    columns = max(1, min(columns, len(chosen)))
    lines = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, lines * (height + TITLE + GAP) + GAP), "#f4f4f2")
    pen = ImageDraw.Draw(sheet)
    for i, block in enumerate(chosen):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + TITLE + GAP)
        here = groups[block]
        kept = here.unique()
        pen.text((x, y), f"block {block % len(groups)}: {int((kept >= 0).sum())} of {here.numel()}", fill="#30343b")
        sheet.paste(Image.fromarray(_panel(shown, here).numpy()), (x, y + TITLE))
    if path is not None:
        sheet.save(path)
    return sheet


def _unnormalised(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """From 0 to 1, a small image enlarged by a whole number."""
    centre, width = (torch.tensor(tuple(v))[:, None, None] for v in (mean, std))
    shown = (image.detach().float().cpu() * width + centre).clamp(0, 1)
    times = -(-LEAST // min(shown.shape[1:]))
    return F.interpolate(shown[None], scale_factor=times, mode="nearest")[0]


def _panel(shown: Tensor, groups: Tensor) -> Tensor:
    """``[H, W, 3]``, uint8: the image with the groups of its patches ``[h, w]`` on it."""
    size = shown.shape[1:]
    large = F.interpolate(groups[None, None].float(), size=size, mode="nearest")[0, 0].long()
    numbers, count = groups.unique(return_counts=True)
    merged = numbers[(numbers >= 0) & (count > 1)]
    colour = torch.zeros(int(groups.max()) + 2, 3)  # one row more, so that -1 finds the last
    wash = torch.zeros(len(colour), 1)
    for number in merged.tolist():  # steps of the golden section keep neighbouring numbers apart
        colour[number] = torch.tensor(colorsys.hsv_to_rgb(number * 0.618034 % 1.0, 0.85, 0.95))
        wash[number] = 0.45
    tint, share = colour[large].permute(2, 0, 1), wash[large].permute(2, 0, 1)
    picture = shown * (1 - share) + tint * share
    grey = (shown.mean(dim=0, keepdim=True) * 0.35 + 0.12).expand_as(shown)
    picture = torch.where(large < 0, grey, picture)
    edge = torch.zeros(size, dtype=torch.bool)
    for axis in (0, 1):
        differs = large.narrow(axis, 1, size[axis] - 1) != large.narrow(axis, 0, size[axis] - 1)
        edge.narrow(axis, 0, size[axis] - 1).logical_or_(differs)
        edge.narrow(axis, 1, size[axis] - 1).logical_or_(differs)
    outlined = edge & (share[0] > 0)
    picture = torch.where(outlined, tint, picture)
    return (picture * 255).round().byte().permute(1, 2, 0).contiguous()
