from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vitzoo.tasks import html
from vitzoo.tasks.figures import class_rows, write_matrix, write_rows
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


def test_a_page_of_a_run_that_has_only_begun_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        html.report(tmp_path, tmp_path / "page.html")
    (tmp_path / "config.yaml").write_text("model:\n  name: <b>odd & name\ndata:\n  root: here\n")
    page = html.report(tmp_path, tmp_path / "new" / "page.html").read_text()
    assert "No epoch has ended yet" in page
    assert "Not evaluated yet" in page
    assert "&lt;b&gt;odd &amp; name" in page
    assert "<b>" not in page


def test_many_classes_are_shown_by_the_pairs_that_are_confused_most(tmp_path):
    (tmp_path / "config.yaml").write_text("model:\n  name: x\n")
    confusion = torch.diag(torch.full((100,), 7))
    confusion[3, 41], confusion[80, 2] = 9, 4
    names = [f"kind {i}" for i in range(100)]
    write_matrix(tmp_path / "val_confusion.csv", confusion, names)
    write_rows(tmp_path / "val_classes.csv", class_rows(confusion, names))
    page = html.report(tmp_path, tmp_path / "page.html").read_text()
    assert "<tr><td>9</td><td>kind 3</td><td>kind 41</td></tr>\n<tr><td>4</td><td>kind 80</td><td>kind 2</td></tr>" in page
    assert page.index("<td>kind 3</td><td>16</td><td>0.4375</td>") < page.index("<td>kind 80</td><td>11</td>")
