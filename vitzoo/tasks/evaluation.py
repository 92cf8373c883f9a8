"""Evaluate any classifier on a set of pictures, outside of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitzoo.data.errors import UserError
from vitzoo.data.sets import EvalSet, mean_corruption_error
from vitzoo.tasks.figures import Figures

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """What was found.

    Attributes:
        figures: ``top1``, ``top5``, ``loss``, ``ece``, ``mce`` (percent), None where a set has no such figure; ``pictures``,
            ``unreadable``, ``images_per_second``.
        confusion: ``[C, C]``, rows are the true classes.
        classes: names of its rows.
    """

    figures: dict[str, float | int | None]
    confusion: Tensor
    classes: list[str]


def _plain(batches: Any) -> Iterable[Any]:
    return batches


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: EvalSet,
    *,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int = 0,
    sigmoid: bool = False,
    watch: Callable[[Any], Iterable[Any]] = _plain,
) -> Evaluation:
    """Run a classifier over a set.

    A picture with several right classes has the one that the model finds likeliest for its label, so top-1, top-5, calibration
    and confusion mean what ReaL's authors count; it has no loss. Files that cannot be read count as wrong.

    Args:
        model: in eval mode, of ``[B, 3, H, W]`` to logits.
        images: the set.
        device: where the model is brought.
        batch_size: pictures.
        workers: processes that load.
        sigmoid: the model was trained with "bce": a confidence is a sigmoid.
        watch: wraps the loop over batches, for a progress bar.

    Returns:
        Figures, confusion and classes.

    Raises:
        UserError: the model has another number of classes than the set.
    """
    chosen = None if images.subset is None else torch.tensor(images.subset, device=device)
    place = {label: i for i, label in enumerate(images.subset)} if images.subset is not None else None
    counted = Figures(len(images.classes), sigmoid=sigmoid).to(device)
    model = model.to(device)
    right, several = torch.zeros(len(images.accepted), dtype=torch.bool), any(len(labels) > 1 for labels in images.accepted)
    seen, warm, began = 0, 0, time.perf_counter()
    since = began
    for batch, numbers in watch(DataLoader(images.pictures, batch_size, num_workers=workers)):
        logits = model(batch.to(device)).float()
        needed = 1000 if images.subset is not None else len(images.classes)
        if logits.shape[-1] != needed:
            raise UserError(f"{images.name} has {needed} classes and the model {logits.shape[-1]}.")
        whole = torch.where(numbers < 0, -1 - numbers, numbers)
        answers = [images.accepted[i] for i in whole.tolist()]
        likeliest = (
            [max(found, key=row.__getitem__) for found, row in zip(answers, logits.tolist(), strict=True)]
            if several
            else [found[0] for found in answers]
        )
        labels = torch.tensor([place[label] for label in likeliest] if place is not None else likeliest, device=device)
        logits = logits if chosen is None else logits[:, chosen]
        broken = (numbers < 0).to(device)
        right[whole] = ((logits.argmax(-1) == labels) & ~broken).cpu()
        counted.update(logits, torch.where(broken, -1 - labels, labels))
        seen += len(numbers)
        if not warm:  # the first batch starts workers and kernels
            warm, since = seen, time.perf_counter()
    took, timed = (time.perf_counter() - since, seen - warm) if seen > warm else (time.perf_counter() - began, seen)
    found = {key: float(value) for key, value in counted.compute().items()}
    unreadable = len(images.pictures.broken()) if hasattr(images.pictures, "broken") else 0
    figures: dict[str, float | int | None] = {
        "top1": 100 * found["top1"],
        "top5": 100 * found["top5"] if "top5" in found else None,
        "loss": None if several else found["loss"],
        "ece": found["ece"],
        "mce": mean_corruption_error(right.tolist(), images.groups) if images.groups else None,
        "pictures": seen,
        "unreadable": unreadable,
        "images_per_second": timed / max(took, 1e-9),
    }
    return Evaluation(figures, counted.confusion.compute().cpu(), images.classes)
