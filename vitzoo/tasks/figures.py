"""What an evaluation counts, as torchmetrics, and the tables that it leaves in a run's folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

__all__ = ["Calibration", "Figures", "Kept", "class_rows", "write_json", "write_matrix", "write_rows"]

SAMPLES, MISTAKES = 8, 16  # pictures kept of an evaluation


class Calibration(Metric):
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3): ``sum_b n_b / n |right_b - confidence_b|``.

    torchmetrics' ``MulticlassCalibrationError`` keeps every confidence; this keeps three numbers a bin, which is also what a
    reliability diagram shows.

    Args:
        bins: Of equal width; a confidence of 1 is in the last.

    Attributes:
        table: ``[3, bins]``: pictures, sum of their confidences, number of those that were right.
    """

    full_state_update = False
    table: Tensor

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("table", torch.zeros(3, bins), dist_reduce_fx="sum")

    def update(self, confidence: Tensor, right: Tensor) -> None:
        """Count pictures: confidence of the answer in 0..1 and whether it was right, both ``[B]``."""
        edges = torch.linspace(0, 1, self.bins + 1, device=confidence.device)
        bin_of = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, self.bins - 1)
        rows = torch.stack((torch.ones_like(confidence), confidence, right.to(confidence.dtype)))
        self.table = self.table.index_add(1, bin_of, rows.to(self.table.dtype))

    def compute(self) -> Tensor:
        """The error, 0 where nothing was counted."""
        pictures, confidence, right = self.table
        return (right - confidence).abs().sum() / pictures.sum().clamp(min=1)


class Kept(Metric):
    """The pictures of an evaluation with the highest keys.

    Args:
        most: How many.

    Attributes:
        rows: ``[most, 5]`` (one such table for each process, once they have met): key, number of the picture in its split, true
            class, answer, confidence; a key of -1 is an empty place.
    """

    full_state_update = False
    rows: Tensor

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.add_state("rows", torch.full((most, 5), -1.0), dist_reduce_fx=None)

    def update(self, key: Tensor, *columns: Tensor) -> None:
        """Offer pictures: key (below 0: not to be kept), number, true class, answer, confidence, all ``[B]``."""
        offered = torch.stack([part.to(self.rows) for part in (key, *columns)], 1)
        both = torch.cat((self.rows, offered))
        self.rows = both[both[:, 0].topk(self.most).indices]

    def compute(self) -> Tensor:
        """The rows ``[n, 5]`` of all processes, highest keys first, at most ``most``."""
        rows = self.rows.reshape(-1, 5)
        rows = rows[rows[:, 0] >= 0]
        return rows[rows[:, 0].argsort(descending=True)][: self.most]


class Figures(nn.Module):
    """Top-1, top-5 (from five classes on), loss, calibration error, confusion and telling pictures of a classifier.

    Args:
        classes: Their number.
        sigmoid: The confidence of an answer is its sigmoid (a model trained with "bce"), else its softmax.
    """

    def __init__(self, classes: int, *, sigmoid: bool = False) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        tops: dict[str, Metric | MetricCollection] = {"top1": MulticlassAccuracy(classes, top_k=1, average="micro")}
        if classes >= 5:
            tops["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro")
        self.accuracy = MetricCollection(tops)
        self.loss = MeanMetric()
        self.calibration = Calibration()
        self.confusion: Any = MulticlassConfusionMatrix(classes)
        self.samples, self.mistakes = Kept(SAMPLES), Kept(MISTAKES)

    def update(self, logits: Tensor, labels: Tensor, numbers: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: ``[B, C]``.
            labels: ``[B]``; ``-1 - label`` where the picture could not be read: it counts as wrong whatever the model says, and
                its loss and confidence do not count at all.
            numbers: Of the pictures in their split; None: none is kept.
        """
        logits, broken = logits.float(), labels < 0
        labels = torch.where(broken, -1 - labels, labels)
        confidence, said = (logits.sigmoid() if self.sigmoid else logits.softmax(-1)).max(-1)
        whole = ~broken
        self.calibration.update(confidence[whole], (said == labels)[whole])
        if whole.any():
            self.loss.update(F.cross_entropy(logits[whole], labels[whole]), weight=whole.sum())
        if numbers is not None:
            numbers = numbers.to(labels.device)
            shuffled = (numbers * 40503 % 65536) / 65536  # any few of a split, the same ones each time
            rows = (numbers, labels, said, confidence)
            self.samples.update(torch.where(whole, shuffled, -1.0), *rows)
            self.mistakes.update(torch.where(whole & (said != labels), confidence, -1.0), *rows)
        if broken.any():
            logits = logits.clone()
            logits[broken] = 0.0
            logits[broken, labels[broken]] = -1.0
        self.accuracy.update(logits, labels)
        self.confusion.update(logits, labels)

    def compute(self) -> dict[str, Tensor]:
        """``top1``, ``top5``, ``loss`` and ``ece``, over all processes."""
        return {**self.accuracy.compute(), "loss": self.loss.compute(), "ece": self.calibration.compute()}

    def reset(self) -> None:
        """Count from zero."""
        for metric in self.children():
            cast(Metric, metric).reset()


def class_rows(confusion: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class of a confusion matrix ``[C, C]`` whose rows are the true classes.

    Args:
        confusion: Counts.
        classes: C names.

    Returns:
        ``class``, ``pictures``, ``accuracy`` (its share that was found; empty where it has no pictures), ``mistaken_for`` (the
        class that its others were most often taken for; empty where there are none) and ``times``.
    """
    rows = []
    counts = confusion.cpu().long()
    wrong = counts - counts.diag().diag()
    for k, name in enumerate(classes):
        pictures, times = int(counts[k].sum()), int(wrong[k].max())
        accuracy = round(int(counts[k, k]) / pictures, 6) if pictures else ""
        other = classes[int(wrong[k].argmax())] if times else ""
        rows.append({"class": name, "pictures": pictures, "accuracy": accuracy, "mistaken_for": other, "times": times or ""})
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows with the same keys as CSV; its folder exists."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_matrix(path: Path, confusion: Tensor, classes: Sequence[str]) -> None:
    """Write a confusion matrix as CSV: a row for each true class, a column for each answer."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, confusion.cpu().long().tolist(), strict=True))


def write_json(path: Path, content: dict[str, Any] | Iterable[Any]) -> None:
    """Write JSON; its folder exists."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
