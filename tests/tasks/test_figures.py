"""What an evaluation of a classifier counts."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.classification import MulticlassCalibrationError

from vitzoo.tasks.figures import Calibration, Figures, Kept, class_rows


def test_calibration_error_is_torchmetrics():
    torch.manual_seed(0)
    ours, theirs = Calibration(), MulticlassCalibrationError(7, n_bins=15, norm="l1")
    for size in (1, 13, 40):
        logits, labels = 2 * torch.randn(size, 7), torch.randint(7, (size,))
        confidence, said = logits.softmax(-1).max(-1)
        ours.update(confidence, said == labels)
        theirs.update(logits, labels)
    assert float(ours.compute()) == pytest.approx(float(theirs.compute()), abs=1e-6)
    assert ours.table[0].sum() == 54


def test_a_certain_answer_belongs_to_the_last_bin():
    metric = Calibration(bins=4)
    metric.update(torch.tensor([1.0, 0.75, 0.0]), torch.tensor([True, False, False]))
    assert metric.table[0].tolist() == [1, 0, 0, 2]
    assert float(metric.compute()) == pytest.approx((0.75) / 3)


def test_the_surest_mistakes_are_kept_whatever_the_batches():
    torch.manual_seed(1)
    logits, labels = torch.randn(50, 5), torch.randint(5, (50,))
    labels[7] = -1 - labels[7]  # unreadable: no mistake of the model's
    confidence, said = logits.softmax(-1).max(-1)
    wrong = (said != labels) & (labels >= 0)
    expected = sorted(wrong.nonzero().flatten().tolist(), key=lambda i: -float(confidence[i]))[:16]
    figures = Figures(5)
    for part in torch.arange(50).split(9):
        figures.update(logits[part], labels[part], part)
    rows = figures.mistakes.compute()
    assert rows[:, 1].int().tolist() == expected
    assert rows[:, 2].int().tolist() == labels[expected].tolist()
    assert rows[:, 3].int().tolist() == said[expected].tolist()
    assert len(set(figures.samples.compute()[:, 1].tolist())) == 8


def test_pictures_of_several_processes_are_ranked_together():
    metric = Kept(2)
    one, other = torch.tensor([[0.9, 4, 0, 1, 0.9], [-1, -1, -1, -1, -1]]), torch.tensor([[0.95, 1, 0, 1, 0.95], [0.2] * 5])
    metric.update(*torch.full((5, 1), 0.1))
    metric.rows = torch.stack((one, other))  # what torchmetrics leaves after it has gathered
    assert metric.compute()[:, 1].tolist() == [1, 4]


def test_every_class_has_a_row():
    confusion = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 0]])
    first, empty, never = class_rows(confusion, ["a", "b", "c"])
    assert first == {"class": "a", "pictures": 4, "accuracy": 0.75, "mistaken_for": "b", "times": 1}
    assert empty == {"class": "b", "pictures": 0, "accuracy": "", "mistaken_for": "", "times": ""}
    assert (never["accuracy"], never["mistaken_for"], never["times"]) == (0.0, "b", 2)
