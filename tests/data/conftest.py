from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """root/train and root/val with the classes "cat 2", "cat 10", "dog": four and two pictures of 40x30 each."""
    draw = np.random.RandomState(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("cat 2", "cat 10", "dog"):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.randint(0, 255, (30, 40, 3), dtype=np.uint8)).save(place / f"{i}.png")
    return tmp_path
