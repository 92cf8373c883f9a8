"""Rendered scenes: discs, boxes, triangles and stars on coloured noise, with boxes, masks and labels; nothing to download.

A scene is a function of its number and size, so that every machine trains and evaluates on the same pictures. Shapes are of
any angle and do not overlap; they are filled plainly, with stripes or with a chequerboard.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .batches import mix

__all__ = ["SHAPES", "Scene", "label_map", "render", "scenes"]

SHAPES = ("disc", "box", "triangle", "star")


class Scene(NamedTuple):
    """A picture and its shapes.

    Attributes:
        image: uint8 ``[S, S, 3]``.
        boxes: ``[n, 4]``: x1, y1, x2, y2.
        labels: ``[n]``, from 1.
        masks: bool ``[n, S, S]``.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def _inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points are inside a shape whose farthest point is at distance 1 from the origin."""
    if shape == "disc":
        return x * x + y * y <= 1
    corners, inner = {"box": (4, math.cos(math.pi / 4)), "triangle": (3, 0.5), "star": (5, 0.42)}[shape]
    half = math.pi / corners
    angle = np.abs((np.arctan2(y, x) + half) % (2 * half) - half)  # folded: 0 at a corner, half between two
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    qx, qy = inner * math.cos(half), inner * math.sin(half)  # the edge runs from (1, 0) to (qx, qy)
    return (qx - 1) * py - qy * (px - 1) >= 0


def render(number: int, size: int = 128) -> Scene:
    """Draw one scene.

    Args:
        number: which.
        size: S, pixels on a side.

    Returns:
        One to four shapes on a ground; a mask covers the pixels of which the shape holds at least half.
    """
    draw = np.random.RandomState(mix("scene", number) % 2**32)
    fine = 2 * size  # rendered at twice the size and averaged
    image = _smooth(draw.uniform(40, 215, (4, 4, 3)), size).astype(np.float32).repeat(2, 0).repeat(2, 1)
    placed: list[tuple[float, float, float]] = []
    labels, masks = [], []
    for _ in range(draw.randint(1, 5)):
        for _ in range(40):
            radius = draw.uniform(fine / 11, fine / 4.5)
            cx, cy = draw.uniform(radius, fine - radius, 2)
            if all(math.hypot(cx - ox, cy - oy) > radius + other + 2 for ox, oy, other in placed):
                break
        else:
            continue
        placed.append((cx, cy, radius))
        kind = draw.randint(len(SHAPES))
        turn = draw.uniform(0, 2 * math.pi)
        x0, y0, x1, y1 = (int(v) for v in (cx - radius, cy - radius, cx + radius + 2, cy + radius + 2))
        x0, y0, x1, y1 = max(0, x0), max(0, y0), min(fine, x1), min(fine, y1)
        gy, gx = np.mgrid[y0:y1, x0:x1] + 0.5
        dx, dy = (gx - cx) / radius, (gy - cy) / radius
        u, v = math.cos(turn) * dx + math.sin(turn) * dy, math.cos(turn) * dy - math.sin(turn) * dx
        inside = _inside(SHAPES[kind], u, v)

        around = image[int(cy), int(cx)]
        colour = draw.uniform(0, 255, 3)
        while np.abs(colour - around).mean() < 70:
            colour = draw.uniform(0, 255, 3)
        texture = draw.randint(3)
        stripes = np.floor(u * 4) % 2
        pattern = (0 * stripes, stripes, (stripes + np.floor(v * 4)) % 2)[texture]
        fill = colour + (pattern * 45 * (-1 if colour.mean() > 127 else 1))[..., None]
        image[y0:y1, x0:x1][inside] = fill[inside]
        whole = np.zeros((fine, fine), np.uint8)
        whole[y0:y1, x0:x1] = inside
        masks.append(_sum_of_cells(whole) >= 2)
        labels.append(kind + 1)
    found = np.stack(masks)
    boxes = []
    for mask in found:
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        boxes.append((cols[0], rows[0], cols[-1] + 1, rows[-1] + 1))
    mean = _sum_of_cells(image) / 4
    pixels = np.clip(mean + draw.normal(0, 7, mean.shape), 0, 255).round().astype(np.uint8)
    return Scene(pixels, np.array(boxes, np.float32), np.array(labels, np.int64), found)


def _smooth(coarse: np.ndarray, size: int) -> np.ndarray:
    """Bilinear enlargement of ``[n, n, c]`` to ``[size, size, c]``, corner to corner."""
    at = np.linspace(0, len(coarse) - 1, size)
    low = np.minimum(at.astype(int), len(coarse) - 2)
    part = (at - low)[:, None, None]
    rows = coarse[low] * (1 - part) + coarse[low + 1] * part
    part = part[None, :, 0]
    return rows[:, low] * (1 - part) + rows[:, low + 1] * part


def _sum_of_cells(x: np.ndarray) -> np.ndarray:
    """Of 2x2 cells."""
    rows = x[::2] + x[1::2]
    return rows[:, ::2] + rows[:, 1::2]


def label_map(scene: Scene) -> np.ndarray:
    """Class of each pixel ``[S, S]``: 0 is the ground."""
    return (scene.masks * scene.labels[:, None, None]).max(0).astype(np.int64)


@lru_cache(maxsize=4)
def scenes(split: str, count: int, size: int = 128) -> tuple[Scene, ...]:
    """The first ``count`` scenes of "train" or "val"; the two share none."""
    start = 0 if split == "train" else 10**6
    return tuple(render(start + i, size) for i in range(count))
