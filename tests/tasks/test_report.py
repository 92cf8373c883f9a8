from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitzoo.tasks.progress import clock
from vitzoo.tasks.report import draw


@pytest.mark.parametrize("classes", [2, 10, 30, 60])
@pytest.mark.parametrize("validated", [True, False])
def test_a_picture_is_drawn_for_any_number_of_classes(tmp_path, classes, validated):
    top1 = 0.5 if validated else None
    rows = [{"epoch": e, "train_loss": 2.0 - e, "val_loss": top1, "val_top1": top1} for e in range(2)]
    confusion = np.eye(classes, dtype=int)
    confusion[0] = 0  # a class without pictures
    draw(rows, confusion, [f"class {i}" for i in range(classes)], "title", tmp_path / "result.png")
    pixels = np.asarray(Image.open(tmp_path / "result.png").convert("L"))
    assert pixels.shape[1] > 1000
    assert pixels.std() > 5


def test_clock_reads_like_one():
    assert [clock(s) for s in (6.6, 750, 11045)] == ["0:07", "12:30", "3:04:05"]
