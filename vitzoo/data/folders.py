"""Find the pictures of an ImageNet-style directory, and refuse what would silently train on something else."""

from __future__ import annotations

from pathlib import Path

import torch

from .batches import mix
from .errors import UserError
from .images import EXTENSIONS, class_folders, list_images

__all__ = ["Split", "find_splits"]

Split = list[tuple[str, int]]
_TRAIN, _VAL = ("train", "training"), ("val", "validation", "valid")


def find_splits(root: str, val_fraction: float = 0.1, class_map: list[str] | None = None) -> tuple[list[str], dict[str, Split]]:
    """List a directory of pictures.

    Two layouts are known: ``root/train/<class>/...`` with ``root/val/<class>/...`` (and ``root/test/...`` where there
    is one), or ``root/<class>/...``, of which ``val_fraction`` of each class (at least one picture) is held out by a
    fixed draw. Classes are the folder names of the training split in natural order; other splits use its labels.

    Args:
        root: The directory.
        val_fraction: Used in the second layout only.
        class_map: Names of the class folders in the order of their labels, those without a folder here too; None: natural
            order of the training split's.

    Returns:
        The class names, and for "train", "val" and "test" the list of ``(path, label)``.

    Raises:
        UserError: No such directory, no class folders, a class folder without pictures, a class that training does not
            know; one sentence with the way out.
    """
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(
            f"data.root is {root!r}, which is no directory. Give a folder with a subfolder of pictures for each class, "
            "or 'digits' for the embedded data."
        )
    train = _first(base, _TRAIN)
    if train is None:
        classes = _classes(base, class_map)
        kept, held = _hold_out(_pictures(base, classes), val_fraction)
        return classes, {"train": kept, "val": held, "test": held}
    val = _first(base, _VAL)
    if val is None:
        raise UserError(
            f"{base} has {train.name}/ but no val/. Add val/ with the same class folders, or give "
            f"--data.root {train} to hold out a part of the training pictures."
        )
    classes = _classes(train, class_map)
    splits = {"train": _pictures(train, classes), "val": _pictures(val, classes, train)}
    test = base / "test"
    has_classes = test.is_dir() and bool(class_folders(test))  # an unlabelled test/ is for ``predict``
    splits["test"] = _pictures(test, classes, train) if has_classes else splits["val"]
    return classes, splits


def _first(base: Path, names: tuple[str, ...]) -> Path | None:
    return next((base / name for name in names if (base / name).is_dir()), None)


def _classes(folder: Path, class_map: list[str] | None) -> list[str]:
    classes = class_folders(folder) if class_map is None else class_map
    if len(classes) < 2:
        raise UserError(f"{folder} has {len(classes)} class folders and needs at least 2: one subfolder for each class.")
    return classes


def _pictures(folder: Path, classes: list[str], train: Path | None = None) -> Split:
    labels = {name: label for label, name in enumerate(classes)}
    samples = []
    for name in class_folders(folder):
        if name not in labels:
            raise UserError(
                f"{folder} has the class folder {name!r}, which {train or 'data.class_map'} has not. Rename it to one of the "
                f"{len(classes)} classes there, or remove it."
            )
        found = list_images(folder / name)
        if not found:
            raise UserError(
                f"The class folder {folder / name} holds no picture ({', '.join(EXTENSIONS)}). Fill it or remove it."
            )
        samples += [(path, labels[name]) for path in found]
    if not samples:
        raise UserError(f"{folder} has no class folders; it needs those of {train}: {', '.join(classes[:5])} ...")
    return samples


def _hold_out(samples: Split, fraction: float) -> tuple[Split, Split]:
    if not 0 < fraction < 1:
        raise UserError(f"data.val_fraction is {fraction} and must lie between 0 and 1 where there is no val/ folder.")
    by_class: dict[int, Split] = {}
    for path, label in samples:
        by_class.setdefault(label, []).append((path, label))
    kept, held = [], []
    for label, members in by_class.items():
        if len(members) < 2:
            raise UserError(
                f"{Path(members[0][0]).parent} holds one picture, and one must be held out. Add more, or make train/ "
                "and val/ folders."
            )
        order = torch.randperm(len(members), generator=torch.Generator().manual_seed(mix("hold out", label))).tolist()
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held += [members[i] for i in sorted(order[:count])]
        kept += [members[i] for i in sorted(order[count:])]
    return kept, held
