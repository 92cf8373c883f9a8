"""Maps and points on the picture that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# dark blue over red and yellow to white, evenly brighter: also told apart in grey
_COLOURS = ((0, 0, 40), (70, 10, 110), (170, 40, 100), (235, 90, 50), (250, 180, 50), (255, 255, 225))


def coloured(values: Tensor) -> Tensor:
    """``[h, w]`` from 0 to 1 as colours ``[3, h, w]`` from 0 to 1."""
    table = torch.tensor(_COLOURS, dtype=torch.float32) / 255
    place = values.detach().float().cpu().clamp(0, 1) * (len(table) - 1)
    low = place.floor().long().clamp(max=len(table) - 2)
    share = (place - low)[..., None]
    return (table[low] * (1 - share) + table[low + 1] * share).permute(2, 0, 1)


def shown(image: Tensor, mean: Sequence[float] = IMAGENET_DEFAULT_MEAN, std: Sequence[float] = IMAGENET_DEFAULT_STD) -> Tensor:
    """A normalised image ``[C, H, W]`` as it was, ``[3, H, W]`` from 0 to 1; of other than three channels the mean, scaled."""
    image = image.detach().float().cpu()
    if image.shape[0] == 3:
        centre, width = (torch.tensor(tuple(v))[:, None, None] for v in (mean, std))
        return (image * width + centre).clamp(0, 1)
    grey = image.mean(dim=0, keepdim=True)
    return ((grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-7)).expand(3, -1, -1)


def draw(
    image: Tensor,
    heat: Tensor | None = None,
    points: Tensor | None = None,
    *,
    path: str | Path | None = None,
    strength: float = 0.55,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Image.Image:
    """A picture of an image with a map over it, or with points on it.

    Args:
        image: as the model was given it, ``[C, H, W]`` or ``[1, C, H, W]``, normalised.
        heat: ``[h, w]`` or ``[1, h, w]`` of any scale: the smallest value becomes dark, the largest bright; resized.
        points: ``[..., 2]``, (row, column) from -1 to 1 between the outermost centres of a map, as ``sampling_points`` gives.
        path: write it here; PNG and whatever else Pillow knows by the ending.
        strength: how far the map covers the image, 0 to 1.
        mean: what the image was normalised with.
        std: likewise.

    Returns:
        An RGB picture of the image's size.

    Raises:
        ValueError: shapes that are not these.
    """
    from PIL import Image, ImageDraw

    image = _single(image, 3, "image", "[C, H, W]")
    picture = shown(image, mean, std)
    if heat is not None:
        heat = _single(heat.detach().float().cpu(), 2, "heat", "[h, w]")
        heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
        heat = F.interpolate(heat[None, None], size=picture.shape[1:], mode="bilinear", align_corners=False)[0, 0]
        picture = picture * (1 - strength) + coloured(heat) * strength
    drawn = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy())
    if points is not None:
        if points.shape[-1] != 2:
            raise ValueError(f"points are [..., 2], got {list(points.shape)}.")
        height, width = picture.shape[1:]
        pen, radius = ImageDraw.Draw(drawn), max(1.0, min(height, width) / 100)
        for row, col in points.detach().float().cpu().reshape(-1, 2).tolist():
            y, u = (row + 1) / 2 * (height - 1), (col + 1) / 2 * (width - 1)
            pen.ellipse((u - radius, y - radius, u + radius, y + radius), fill="#e4572e", outline="white")
    if path is not None:
        drawn.save(path)
    return drawn


def _single(value: Tensor, dims: int, name: str, form: str) -> Tensor:
    if value.ndim == dims + 1 and value.shape[0] == 1:
        value = value[0]
    if value.ndim != dims:
        raise ValueError(f"{name} is one {form}, got {list(value.shape)}. Draw the images of a batch one by one.")
    return value
