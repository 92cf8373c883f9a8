"""Small folders of pictures, in the layouts that people have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def by_class(root: Path, train: int = 6, val: int = 2) -> Path:
    """Three classes of noisy colours, blue, green and red: ``root/train/blue/0.jpg`` and so on."""
    draw = np.random.RandomState(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.randint(0, 100, (48, 40, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 120
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    return root


def ade20k(root: Path) -> Path:
    """Two pictures a split with masks of 150 classes and 0 for none, laid out as ADE20K is."""
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(2):
            pixels = np.random.RandomState(i).randint(0, 255, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"images/{split}/{i}.jpg")
            Image.fromarray(pixels[..., 0] % 151).save(root / f"annotations/{split}/{i}.png")
    return root
