"""ImageNet's evaluation sets by name: which pictures, which answers are right, and among which classes a model chooses.

A model is one of ImageNet-1k's 1,000 classes in their usual order. Nothing is downloaded: a set is the folder that its authors
publish.

- ``imagenet``: the validation set as class folders (Russakovsky et al. 2015, arXiv:1409.0575).
- ``imagenet-v2``: folders 0 to 999, or class folders (Recht et al. 2019, arXiv:1902.10811).
- ``imagenet-real``: the validation pictures with reassessed labels, several a picture; those that have none do not count (Beyer
  et al. 2020, arXiv:2006.07159). ``real.json`` beside the pictures, else the copy that timm carries.
- ``imagenet-c``: ``<corruption>/<severity>/<class>`` with the mean corruption error (Hendrycks and Dietterich 2019,
  arXiv:1903.12261, section 4.1).
- ``imagenet-a``, ``imagenet-r``: 200 classes, and answers are taken among these 200 (Hendrycks et al. 2021, arXiv:1907.07174
  and arXiv:2006.16241).
- ``imagenet-sketch``: class folders (Wang et al. 2019, arXiv:1905.13549).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageNetInfo

from .errors import UserError, among
from .images import FolderImages, Images, list_images

__all__ = ["ALEXNET_ERROR", "SETS", "EvalSet", "mean_corruption_error", "named_set"]

# Top-1 error of AlexNet, the mean over the five severities, by which a corruption's errors are divided (the authors' constants)
ALEXNET_ERROR = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = range(1, 6)


@dataclass(frozen=True)
class EvalSet:
    """Pictures with the answers that are right.

    Attributes:
        name: of the set.
        pictures: items are ``(transformed picture, number)``, ``-1 - number`` where a file cannot be read.
        accepted: for each picture the classes that are right, as the model numbers them.
        classes: names of the classes that answers are taken among.
        subset: those classes as the model numbers them; None: all of the model's.
        groups: of each picture, "corruption/severity"; empty where there are none.
        notes: what is missing, in sentences.
    """

    name: str
    pictures: Images
    accepted: list[tuple[int, ...]]
    classes: list[str]
    subset: tuple[int, ...] | None = None
    groups: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Transform = Callable[[Image.Image], Any]


@cache
def _synsets() -> dict[str, int]:
    return {name: i for i, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _timm_file(name: str) -> str:
    return resources.files("timm.data").joinpath("_info").joinpath(name).read_text()


def _names(labels: Iterable[int]) -> list[str]:
    info = ImageNetInfo("imagenet-1k")
    return [f"{info.index_to_label_name(i)} {info.index_to_description(i).split(', ')[0]}" for i in labels]


def _class_of(folder: str, *, numbered: bool) -> int | None:
    """ImageNet-1k's number of a class folder's name."""
    if numbered and folder.isdecimal() and int(folder) < len(_synsets()):
        return int(folder)
    return _synsets().get(folder)


def _tree(name: str, root: Path, *, numbered: bool = False) -> list[tuple[str, int]]:
    """``(path, class)`` of the pictures in the class folders of ``root``, of ``root/val`` or of the only folder in it."""
    if not root.is_dir():
        raise UserError(f"There is no folder {root}, where {name} was to be.")
    inside = [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    tried = [root, root / "val", root / "validation", *(inside if len(inside) == 1 else [])]
    for base in filter(Path.is_dir, tried):
        folders = {f: _class_of(f.name, numbered=numbered) for f in sorted(base.iterdir()) if f.is_dir() and f.name[0] != "."}
        if not any(label is not None for label in folders.values()):
            continue
        strange = [folder.name for folder, label in folders.items() if label is None]
        if strange:
            raise UserError(f"{base} has the folder {strange[0]!r}, which is no class of ImageNet-1k: remove or rename it.")
        found = [(path, label) for folder, label in folders.items() if label is not None for path in list_images(folder)]
        if found:
            return found
    kind = "0 to 999 or n01440764 and so on" if numbered else "n01440764 and so on"
    raise UserError(f"{root} holds no pictures in class folders ({kind}), as {name} has them.")


def _of_classes(
    name: str, root: Path, transform: Transform, subset: tuple[int, ...] | None, *, numbered: bool = False
) -> EvalSet:
    found = _tree(name, root, numbered=numbered)
    labels = [label for _, label in found]
    expected = set(subset or range(len(_synsets())))
    outside = sorted(set(labels) - expected)
    if outside:
        raise UserError(f"{root} has pictures of {_names(outside)[0]!r}, which is none of {name}'s {len(expected)} classes.")
    notes = _missing(name, root, len(set(labels)), len(expected))
    pictures = _numbered([path for path, _ in found], transform)
    return EvalSet(name, pictures, [(i,) for i in labels], _names(subset or range(len(_synsets()))), subset, notes=notes)


def _missing(name: str, root: Path, found: int, expected: int) -> list[str]:
    return [] if found == expected else [f"{root} has {found} of {name}'s {expected} classes: figures are not comparable."]


def _numbered(paths: list[str], transform: Transform) -> FolderImages:
    samples = [(path, number) for number, path in enumerate(paths)]
    return FolderImages(samples, [], transform, skip_corrupt=True, exif=False)


def _subset(name: str) -> tuple[int, ...]:
    return tuple(int(i) for i in _timm_file(f"{name.replace('-', '_')}_indices.txt").split())


def _real(name: str, root: Path, transform: Transform) -> EvalSet:
    beside = root / "real.json"
    labels: list[list[int]] = json.loads(beside.read_text() if beside.is_file() else _timm_file("imagenet_real_labels.json"))
    paths: list[str] = []
    accepted: list[tuple[int, ...]] = []
    listed = list_images(root) if root.is_dir() else []
    for path in listed:
        number = re.search(r"ILSVRC2012_val_(\d{8})", Path(path).name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise UserError(f"{path}: {name} finds a picture's labels by its name, ILSVRC2012_val_00000001.JPEG and so on.")
        if right := labels[int(number[1]) - 1]:
            paths.append(path)
            accepted.append(tuple(right))
    if not paths:
        raise UserError(f"{root} holds no picture of ImageNet's validation set that {name} has a label for.")
    count = len(labels)
    notes = [] if len(listed) == count else [f"{root} has {len(listed)} of {count} pictures: figures are not comparable."]
    return EvalSet(name, _numbered(paths, transform), accepted, _names(range(len(_synsets()))), notes=notes)


def _corrupted(name: str, root: Path, transform: Transform) -> EvalSet:
    paths: list[str] = []
    accepted: list[tuple[int, ...]] = []
    groups: list[str] = []
    missing: list[str] = []
    for corruption in ALEXNET_ERROR:
        places = [
            root / corruption,
            *sorted(root.glob(f"*/{corruption}")),
        ]  # the archives have noise/, blur/, weather/, digital/
        folder = next((place for place in places if place.is_dir()), None)
        for severity in SEVERITIES:
            base = folder / str(severity) if folder is not None else None
            if base is None or not base.is_dir():
                missing.append(f"{corruption}/{severity}")
                continue
            for path, label in _tree(name, base):
                paths.append(path)
                accepted.append((label,))
                groups.append(f"{corruption}/{severity}")
    if not paths:
        raise UserError(f"{root} holds no <corruption>/<severity>/<class> such as gaussian_noise/1/n01440764.")
    classes = range(len(_synsets()))
    notes = _missing(name, root, len({right[0] for right in accepted}), len(classes))
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes.append(f"{root} lacks {len(missing)} of the {15 * len(SEVERITIES)} folders of {name} ({some}): there is no mCE.")
    return EvalSet(name, _numbered(paths, transform), accepted, _names(classes), groups=groups, notes=notes)


SETS: dict[str, Callable[[str, Path, Transform], EvalSet]] = {
    "imagenet": lambda name, root, transform: _of_classes(name, root, transform, None),
    "imagenet-v2": lambda name, root, transform: _of_classes(name, root, transform, None, numbered=True),
    "imagenet-real": _real,
    "imagenet-c": _corrupted,
    "imagenet-a": lambda name, root, transform: _of_classes(name, root, transform, _subset(name)),
    "imagenet-r": lambda name, root, transform: _of_classes(name, root, transform, _subset(name)),
    "imagenet-sketch": lambda name, root, transform: _of_classes(name, root, transform, None),
}


def named_set(name: str, root: str | Path, transform: Transform) -> EvalSet:
    """The pictures of an evaluation set and the answers that are right.

    Args:
        name: a key of :data:`SETS`.
        root: folder as its authors publish it, see above; class folders may lie in ``val/`` or in a folder of their own.
        transform: from a PIL picture to a tensor.

    Returns:
        The set; its ``notes`` say what is missing in the folder.

    Raises:
        UserError: another name, a folder that is not the set's.
    """
    among("--set", name, SETS)
    return SETS[name](name, Path(root).expanduser(), transform)


def mean_corruption_error(right: Iterable[bool], groups: Iterable[str]) -> float | None:
    """mCE in percent: the mean over corruptions of the errors' sum over severities, divided by AlexNet's.

    Args:
        right: whether each picture's answer is right.
        groups: "corruption/severity" of each.

    Returns:
        It, or None where one of the 75 groups has no picture.
    """
    counts: dict[str, tuple[int, int]] = {}
    for hit, group in zip(right, groups, strict=True):
        wrong, number = counts.get(group, (0, 0))
        counts[group] = wrong + (not hit), number + 1
    relative = []
    for corruption, theirs in ALEXNET_ERROR.items():
        found = [counts.get(f"{corruption}/{severity}") for severity in SEVERITIES]
        errors = [wrong / number for wrong, number in filter(None, found)]
        if len(errors) < len(SEVERITIES):
            return None
        relative.append(sum(errors) / len(errors) / theirs)
    return 100 * sum(relative) / len(relative)
