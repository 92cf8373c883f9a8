"""Pictures with a class for every pixel: rendered scenes, ADE20K, Cityscapes, Pascal VOC, or folders of masks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from .base import StepData, lists, workers
from .batches import Item, parts, reseed
from .coco import VOC_CLASSES
from .errors import UserError
from .images import list_images, read_image
from .scenes import SHAPES, label_map, scenes

__all__ = ["CITYSCAPES_CLASSES", "IGNORE", "Augment", "Labelled", "SegmentationData", "find_masks", "read_mask"]

IGNORE = 255
CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class Masks(NamedTuple):
    """A set of pictures with masks.

    Attributes:
        classes: names.
        pairs: (picture, mask) by split.
        table: class of each value that a mask may hold (``IGNORE``: none); values from its end on are unknown.
    """

    classes: list[str]
    pairs: dict[str, list[tuple[str, str]]]
    table: np.ndarray


def read_mask(path: str | Path, table: np.ndarray) -> np.ndarray:
    """Read a mask file as classes, int64 ``[H, W]``.

    Args:
        path: A PNG of values (grey, 16-bit grey or palette; a palette's colours are not looked at).
        table: See :class:`Masks`.

    Returns:
        Classes, ``IGNORE`` where a pixel has none.

    Raises:
        UserError: The file cannot be read, has colours instead of values, or holds a value that the table does not know.
    """
    try:
        with Image.open(path) as image:
            image.load()
            values = np.array(image)
    except Exception as error:  # as in read_image: Pillow's decoders raise anything
        raise UserError(f"{path} cannot be read as a mask ({type(error).__name__}: {error}).") from error
    if values.ndim != 2:
        raise UserError(f"{path} has {values.shape[-1]} channels; a mask has one value a pixel (a grey or palette PNG).")
    values = values.astype(np.int64)
    known = len(table)
    if values.size and (values.min() < 0 or values.max() >= known or (table[values] < 0).any()):
        bad = values[(values < 0) | (values >= known)]
        value = bad[0] if bad.size else values[table[values] < 0][0]
        classes = int(table[table != IGNORE].max()) + 1
        raise UserError(
            f"{path} holds the value {value}, and the {classes} classes know none such. Correct data.classes or the mask; "
            f"{IGNORE} marks pixels without a class."
        )
    return table[values]


def _table(known: dict[int, int]) -> np.ndarray:
    """-1 for values that no class has."""
    table = np.full(256, -1, np.int64)
    for value, label in known.items():
        table[value] = label
    table[IGNORE] = IGNORE
    return table


def _pair(images: Path, masks: Path, mask_of: Callable[[Path], Path]) -> list[tuple[str, str]]:
    if not images.is_dir() or not masks.is_dir():
        raise UserError(f"Pictures are looked for in {images} and their masks in {masks}: one of them is no directory.")
    pairs = [(path, str(masks / mask_of(Path(path).relative_to(images)))) for path in list_images(images)]
    for path, mask in pairs:
        if not os.path.isfile(mask):
            raise UserError(f"{path} has no mask: {mask} does not exist.")
    if not pairs:
        raise UserError(f"{images} holds no picture.")
    return pairs


def find_masks(root: str, kind: str | None, classes: list[str] | None) -> Masks:
    """List a directory of pictures and masks.

    Args:
        root: The directory.
        kind: "ade20k" (``images/training``, ``annotations/training``: 0 is no class, 1 to 150 are), "cityscapes"
            (``leftImg8bit/train``, ``gtFine/train``, labelIds), "voc" (``JPEGImages``, ``SegmentationClass``,
            ``ImageSets/Segmentation``), "folder" (``images/train``, ``masks/train``: value k is class k); None: seen.
        classes: Names, for "folder"; else taken from ``classes.txt`` in the directory, a name a line.

    Returns:
        What is there.

    Raises:
        UserError: Another kind, a folder, mask or list of names that is not there.
    """
    base = Path(root).expanduser()
    if not base.is_dir():
        raise UserError(f"data.root is {root!r}, which is no directory. Give one, or 'scenes' for the rendered scenes.")
    if kind is None:
        signs = {"leftImg8bit": "cityscapes", "SegmentationClass": "voc", "annotations": "ade20k", "masks": "folder"}
        kind = next((name for sign, name in signs.items() if (base / sign).is_dir()), None)
        if kind is None:
            raise UserError(f"{base} holds none of {', '.join(signs)}/: give --data.format, or another data.root.")
    png = lambda path: path.with_suffix(".png")  # noqa: E731
    if kind == "ade20k":
        pairs = {
            split: _pair(base / "images" / long, base / "annotations" / long, png)
            for split, long in (("train", "training"), ("val", "validation"))
        }
        info = base / "objectInfo150.txt"
        lines = info.read_text(encoding="utf-8").splitlines()[1:] if info.is_file() else []
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines] or [f"class {i + 1}" for i in range(150)]
        return Masks(names, pairs, _table({0: IGNORE, **{i + 1: i for i in range(len(names))}}))
    if kind == "cityscapes":
        renamed = lambda path: path.with_name(path.name.replace("_leftImg8bit", "_gtFine_labelIds"))  # noqa: E731
        pairs = {s: _pair(base / "leftImg8bit" / s, base / "gtFine" / s, renamed) for s in ("train", "val")}
        known = {**dict.fromkeys(range(34), IGNORE), **{value: i for i, value in enumerate(_CITYSCAPES_IDS)}}
        return Masks(list(CITYSCAPES_CLASSES), pairs, _table(known))
    if kind == "voc":
        pairs = {}
        for split in ("train", "val"):
            listing = base / "ImageSets" / "Segmentation" / f"{split}.txt"
            if not listing.is_file():
                raise UserError(f"{listing} does not exist: data.root is the folder of one VOC year.")
            names = listing.read_text().split()
            pairs[split] = [(str(base / f"JPEGImages/{n}.jpg"), str(base / f"SegmentationClass/{n}.png")) for n in names]
        return Masks(["background", *VOC_CLASSES], pairs, _table({i: i for i in range(21)}))
    if kind == "folder":
        listing = base / "classes.txt"
        if classes is None and listing.is_file():
            classes = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not classes:
            raise UserError(f"The classes have no names: give data.classes, or {listing} with a name a line, value 0 first.")
        pairs = {s: _pair(base / "images" / s, base / "masks" / s, png) for s in ("train", "val")}
        return Masks(list(classes), pairs, _table({i: i for i in range(len(classes))}))
    raise UserError(f"data.format is {kind!r} and must be 'ade20k', 'cityscapes', 'voc' or 'folder'.")


class Augment:
    """mmsegmentation's training pipeline: random size, random crop in which no class has it all, flips, colours; pads.

    Args:
        size: Shorter edge of the picture at scale 1; None: as it is.
        scale: Range of the random size.
        crop: Pixels on a side of what comes out.
        hflip: Probability.
        vflip: Probability.
        transpose: Probability of exchanging rows and columns.
        photometric: Distort colours.
        mean: A channel, of 0..1.
        std: Likewise.
    """

    def __init__(
        self,
        size: int | None,
        scale: list[float],
        crop: int,
        *,
        hflip: float,
        vflip: float,
        transpose: float,
        photometric: bool,
        mean: list[float],
        std: list[float],
    ) -> None:
        self.size, self.scale, self.crop = size, scale, crop
        self.hflip, self.vflip, self.transpose = hflip, vflip, transpose
        self.distort = v2.RandomPhotometricDistort() if photometric else None
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        draw = lambda: float(torch.rand(()))  # noqa: E731
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * draw()
        edge = min(image.shape[-2:])
        factor *= (self.size or edge) / edge
        if factor != 1:
            size = [max(1, round(n * factor)) for n in image.shape[-2:]]
            resized = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)
            image = resized[0].round().clamp(0, 255).to(torch.uint8)
            labels = F.interpolate(labels[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()
        for _ in range(10):  # a crop of which one class holds more than three quarters is drawn again
            top, left = (int(draw() * (max(0, n - self.crop) + 1)) for n in labels.shape)
            cut = labels[top : top + self.crop, left : left + self.crop]
            counts = torch.bincount(cut[cut != IGNORE].flatten())
            if min(labels.shape) <= self.crop or (counts.numel() and counts.max() < 0.75 * counts.sum()):
                break
        image, labels = image[..., top : top + self.crop, left : left + self.crop], cut
        if draw() < self.hflip:
            image, labels = image.flip(-1), labels.flip(-1)
        if draw() < self.vflip:
            image, labels = image.flip(-2), labels.flip(-2)
        if draw() < self.transpose:
            image, labels = image.transpose(-1, -2), labels.transpose(-1, -2)
        if self.distort is not None:
            image = self.distort(image)
        image = normalised(image, self.mean, self.std)
        bottom, right = (self.crop - n for n in labels.shape)
        return F.pad(image, (0, right, 0, bottom)), F.pad(labels, (0, right, 0, bottom), value=IGNORE)


class Resize:
    """Evaluation: the shorter edge to ``size`` (None: as it is), the longer to at most ``longest``; labels stay as they are."""

    def __init__(self, size: int | None, longest: int | None, mean: list[float], std: list[float]) -> None:
        self.size, self.longest, self.mean, self.std = size, longest, mean, std

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.size is not None:
            short, long = sorted(image.shape[-2:])
            factor = self.size / short
            if self.longest is not None:
                factor = min(factor, self.longest / long)
            size = [max(1, round(n * factor)) for n in image.shape[-2:]]
            if size != list(image.shape[-2:]):
                resized = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False, antialias=True)
                image = resized[0].round().clamp(0, 255).to(torch.uint8)
        return normalised(image, self.mean, self.std), labels


def normalised(image: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 ``[3, H, W]`` to floats of this mean and deviation."""
    return (image.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


class Labelled(Dataset):
    """``(image [3, H, W], classes int64 [H, W])``, transformed.

    Args:
        pairs: (picture, mask) as paths, or as uint8 pixels and classes.
        table: Class of each value in a mask file.
        transform: Of image and classes.
        exif: As for :func:`vitzoo.data.read_image`.
    """

    def __init__(self, pairs: list[tuple[Any, Any]], table: np.ndarray, transform: Any, *, exif: bool = False) -> None:
        self.pairs, self.table, self.transform, self.exif = pairs, table, transform, exif

    def __len__(self) -> int:
        return len(self.pairs)

    def pixels(self, index: int) -> np.ndarray:
        """The picture, uint8 ``[H, W, 3]``."""
        picture = self.pairs[index][0]
        return picture if isinstance(picture, np.ndarray) else np.array(read_image(picture, exif=self.exif))

    def __getitem__(self, item: int | tuple[int, int] | Item) -> tuple[Tensor, Tensor]:
        index, seed, _ = parts(item)
        if seed is not None:
            reseed(seed)
        pixels, mask = self.pixels(index), self.pairs[index][1]
        if mask is None:
            labels: Any = np.full(pixels.shape[:2], IGNORE, np.int64)
        else:
            labels = mask if isinstance(mask, np.ndarray) else read_mask(mask, self.table)
        if labels.shape[:2] != pixels.shape[:2]:
            raise UserError(
                f"{self.pairs[index][0]} has {pixels.shape[0]}x{pixels.shape[1]} pixels and its mask "
                f"{labels.shape[0]}x{labels.shape[1]}: they do not belong together."
            )
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        return self.transform(image, torch.from_numpy(np.ascontiguousarray(labels)))


class SegmentationData(StepData):
    """Pictures with a class a pixel; training batches are tensors, evaluation batches lists (sizes differ).

    Args:
        root: "scenes" (rendered, nothing to download) or a directory, see :func:`find_masks`.
        batch_size: Pictures in a step over all devices together.
        num_workers: Processes that load; None: none for scenes, else one a core, 8 at most.
        seed: Of the order of the pictures and of every augmentation; the command line sets it from ``seed_everything``.
        format: "ade20k", "cityscapes", "voc" or "folder"; None: seen from the directory.
        classes: Names, for "folder".
        size: Shorter edge that pictures are resized to; None: as they are.
        longest: Longer edge at most, in evaluation.
        crop: Pixels on a side of a training picture.
        scale: Range of the random size in training.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        transpose: Probability of exchanging rows and columns.
        photometric: Distort colours.
        train_scenes: Number of rendered scenes to train on.
        val_scenes: Number held out.
        scene_size: Their pixels on a side.
        predict: Folder of pictures for the ``predict`` command.

    Raises:
        UserError: What cannot be found or read; one sentence.
    """

    eval_collate = staticmethod(lists)

    def __init__(
        self,
        root: str = "scenes",
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
        format: str | None = None,  # noqa: A002 (the key of the config)
        classes: list[str] | None = None,
        size: int | None = None,
        longest: int | None = None,
        crop: int = 512,
        scale: list[float] = [1.0, 1.0],  # noqa: B006 (never written; a list is what YAML gives)
        hflip: float = 0.5,
        vflip: float = 0.0,
        transpose: float = 0.0,
        photometric: bool = False,
        train_scenes: int = 800,
        val_scenes: int = 200,
        scene_size: int = 96,
        predict: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedded = root == "scenes"
        self.num_workers = workers(num_workers, embedded=self.embedded)
        self.check_loading()
        self.sets = {}
        names = ["ground", *SHAPES]
        self.found = Masks(names, {}, np.zeros(0, np.int64)) if self.embedded else find_masks(root, format, classes)
        self.classes = self.found.classes
        self.num_classes = len(self.classes)

    def _pairs(self, split: str) -> list[tuple[Any, Any]]:
        hp = self.hparams
        if not self.embedded:
            return list(self.found.pairs[split])
        count = hp.train_scenes if split == "train" else hp.val_scenes
        return [(scene.image, label_map(scene)) for scene in scenes(split, count, hp.scene_size)]

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of "fit", "validate", "test" or "predict", normalised as the trainer's model asks."""
        hp = self.hparams
        model = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        norm: dict[str, Any] = {
            "mean": getattr(model, "mean", [0.485, 0.456, 0.406]),
            "std": getattr(model, "std", [0.229, 0.224, 0.225]),
        }
        if stage in ("fit", None) and "train" not in self.sets:
            flips: dict[str, Any] = {
                "hflip": hp.hflip,
                "vflip": hp.vflip,
                "transpose": hp.transpose,
                "photometric": hp.photometric,
            }
            augment = Augment(hp.size, list(hp.scale), hp.crop, **flips, **norm)
            self.sets["train"] = Labelled(self._pairs("train"), self.found.table, augment)
            self.enough()
        resize = Resize(hp.size, hp.longest, **norm)
        if stage == "predict":
            if hp.predict is None or not os.path.isdir(hp.predict):
                raise UserError(f"data.predict is {hp.predict!r}: give --data.predict FOLDER of pictures.")
            pairs: list[tuple[Any, Any]] = [(path, None) for path in list_images(hp.predict)]
            self.sets["predict"] = Labelled(pairs, self.found.table, resize, exif=True)
            return
        for split in ("test",) if stage == "test" else ("val",):
            if split not in self.sets:
                self.sets[split] = Labelled(self._pairs("val"), self.found.table, resize)
