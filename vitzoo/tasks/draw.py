"""Boxes, masks and labels on pictures, side by side."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["Surest", "colour", "draw_boxes", "draw_classes", "sheet"]


class Surest:
    """The pairs of pictures (truth, answer) with the highest keys; a pair is drawn only if it is one of them.

    Args:
        most: How many.

    Attributes:
        pairs: ``(key, truth, answer)``, highest key first.
    """

    def __init__(self, most: int = 6) -> None:
        self.most = most
        self.pairs: list[tuple[float, Image.Image, Image.Image]] = []

    def offer(self, key: float, draw: Callable[[], tuple[Image.Image, Image.Image]]) -> None:
        """Keep a picture if its key is above 0 and one of the highest so far."""
        if key > 0 and (len(self.pairs) < self.most or key > self.pairs[-1][0]):
            self.pairs = sorted([*self.pairs, (key, *draw())], key=lambda pair: -pair[0])[: self.most]


def colour(number: int) -> tuple[int, int, int]:
    """A colour for a class; neighbours differ (golden angle), and two runs agree."""
    red, green, blue = colorsys.hsv_to_rgb((0.09 + number * 0.381966) % 1.0, 0.85 if number % 2 else 0.7, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_boxes(
    image: np.ndarray,
    boxes: Any,
    labels: Any,
    scores: Any = None,
    masks: Any = None,
    classes: Sequence[str] = (),
    threshold: float = 0.5,
) -> Image.Image:
    """Objects on a picture.

    Args:
        image: uint8 ``[H, W, 3]``.
        boxes: ``[n, 4]``: x1, y1, x2, y2 in pixels.
        labels: ``[n]``, from 1.
        scores: ``[n]``; those below ``threshold`` are not drawn. None: all are.
        masks: ``[n, H, W]``: bool, or probabilities that count from 0.5.
        classes: names; label k is ``classes[k - 1]``.
        threshold: see ``scores``.

    Returns:
        A picture of the same size.
    """
    boxes, labels = np.asarray(boxes, dtype=float).reshape(-1, 4), np.asarray(labels, dtype=int)
    shown = [i for i in range(len(boxes)) if scores is None or float(scores[i]) >= threshold]
    pixels = image.astype(np.float32).copy()
    if masks is not None:
        for i in shown:
            inside = np.asarray(masks[i]) >= 0.5 if np.asarray(masks[i]).dtype != bool else np.asarray(masks[i])
            pixels[inside] = 0.5 * pixels[inside] + 0.5 * np.array(colour(labels[i]), np.float32)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    large = max(image.shape[:2])
    font, width = ImageFont.load_default(size=max(9, large // 40)), max(1, large // 300)
    for i in shown:
        x1, y1, x2, y2 = (float(v) for v in boxes[i])
        if x2 < x1 or y2 < y1:
            continue
        pen.rectangle((x1, y1, x2, y2), outline=colour(labels[i]), width=width)
        name = classes[labels[i] - 1] if 0 < labels[i] <= len(classes) else str(labels[i])
        text = name if scores is None else f"{name} {float(scores[i]):.2f}"
        left, top, right, bottom = pen.textbbox((x1, y1), text, font=font, anchor="lb")
        if top < 0:
            left, top, right, bottom = pen.textbbox((x1, y1), text, font=font, anchor="lt")
        shift = max(0, right - picture.width)
        pen.rectangle((left - 1 - shift, top - 1, right + 1 - shift, bottom + 1), fill=colour(labels[i]))
        pen.text((left - shift, top), text, fill="black", font=font, anchor="lt")
    return picture


def draw_classes(image: np.ndarray, labels: Any, classes: Sequence[str] = (), strength: float = 0.6) -> Image.Image:
    """Classes of pixels as colours over a picture, with a legend of those that occur.

    Args:
        image: uint8 ``[H, W, 3]``.
        labels: ``[H, W]``; pixels of 255 stay uncoloured.
        classes: names; no legend without.
        strength: of the colours.

    Returns:
        A picture of the same size.
    """
    labels = np.asarray(labels)
    pixels = image.astype(np.float32).copy()
    present = [int(k) for k in np.unique(labels) if k != 255]
    for k in present:
        inside = labels == k
        pixels[inside] = (1 - strength) * pixels[inside] + strength * np.array(colour(k), np.float32)
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    if classes:
        size = max(9, max(image.shape[:2]) // 40)
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=size)
        for row, k in enumerate(present):
            top = 2 + row * (size + 3)
            pen.rectangle((2, top, 2 + size, top + size), fill=colour(k), outline="black")
            name = classes[k] if k < len(classes) else str(k)
            pen.text((size + 6, top), name, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return picture


def sheet(pictures: Sequence[Image.Image], columns: int = 4, edge: int = 256, captions: Sequence[str] = ()) -> Image.Image:
    """Pictures in rows, each scaled to fit ``edge`` x ``edge``, with a caption below where there is one.

    Args:
        pictures: at least one.
        columns: of the sheet.
        edge: pixels.
        captions: for the first pictures.

    Returns:
        The sheet.
    """
    high = edge + (18 if captions else 0)
    columns = min(columns, max(1, len(pictures)))
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * (edge + 6) + 6, rows * (high + 6) + 6), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for i, picture in enumerate(pictures):
        factor = edge / max(picture.size)
        small = picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))))
        x, y = 6 + (i % columns) * (edge + 6), 6 + (i // columns) * (high + 6)
        canvas.paste(small, (x + (edge - small.width) // 2, y + (edge - small.height) // 2))
        if i < len(captions):
            pen.text((x + 2, y + edge + 2), captions[i], fill="#30343b", font=font)
    return canvas
