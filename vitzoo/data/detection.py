"""Pictures with boxes (and masks) for Lightning: rendered scenes, COCO files, Pascal VOC."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask

from .base import StepData, lists, workers
from .coco import Annotated, Record, folder_records, read_coco, read_voc, scene_records
from .errors import UserError

__all__ = ["Augment", "DetectionData"]


class Augment:
    """Flips, large scale jitter and photometric distortion of a picture with boxes and masks; draws from torch's generator.

    Args:
        hflip: Probability.
        vflip: Probability.
        scale: Range of the random size, relative to ``crop``, to which the picture is then cut (Ghiasi et al. 2021); None: off.
        crop: Pixels on a side.
        photometric: Distort brightness, contrast, saturation and hue (SSD's recipe).
    """

    def __init__(
        self,
        hflip: float = 0.5,
        vflip: float = 0.0,
        scale: list[float] | None = None,
        crop: int = 1024,
        photometric: bool = False,
    ) -> None:
        steps: list[Any] = []
        if scale is not None:
            steps += [v2.ScaleJitter((crop, crop), (scale[0], scale[1]), antialias=True), _Cut(crop)]
        steps += [v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)]
        if photometric:
            steps.append(v2.RandomPhotometricDistort())
        self.steps = v2.Compose(steps)

    def __call__(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        size = (image.shape[-2], image.shape[-1])
        known = {"boxes": BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)}
        if "masks" in target:
            known["masks"] = Mask(target["masks"])
        image, known = self.steps(image, known)
        target = {**target, **{key: value.as_subclass(Tensor) for key, value in known.items()}}
        return plain(image, _whole(target, image.shape[-2], image.shape[-1]))


class _Cut(torch.nn.Module):
    """A random crop of at most this size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor, known: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        height, width = (min(self.size, n) for n in image.shape[-2:])
        return v2.RandomCrop((height, width))(image, known)


def plain(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """uint8 to 0..1, nothing else."""
    return image.float() / 255, target


def _whole(target: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Boxes cut at the border of the picture; what has no area left goes."""
    boxes = target["boxes"]
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    out = {**target, "boxes": boxes[kept], "labels": target["labels"][kept]}
    if "masks" in target:
        out["masks"] = target["masks"][kept]
    return out


class DetectionData(StepData):
    """Pictures with objects; a batch is ``(list of images [3, H, W] in 0..1, list of targets)``.

    Args:
        root: "scenes" (rendered, nothing to download), a folder of a COCO year (``annotations/instances_train2017.json``,
            ``train2017/``, the same for val), or of a Pascal VOC year.
        batch_size: Pictures in a step over all devices together.
        num_workers: Processes that load; None: none for scenes, else one a core, 8 at most.
        seed: Of the order of the pictures and of every augmentation; the command line sets it from ``seed_everything``.
        format: "coco" or "voc"; None: seen from the folder.
        masks: Load masks too (instance segmentation).
        train_images: Folder of the training pictures; None: COCO's name below ``root``. May be absolute.
        train_annotations: COCO file of the training pictures; None: COCO's name below ``root``.
        val_images: As ``train_images``.
        val_annotations: As ``train_annotations``.
        train_split: VOC's name of the split to train on.
        val_split: VOC's name of the split to evaluate on.
        skip_empty: Leave out training pictures that hold no object.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        jitter: Range of large scale jitter; None: off.
        crop: Pixels on a side after the jitter.
        photometric: Distort colours.
        train_scenes: Number of rendered scenes to train on.
        val_scenes: Number held out.
        scene_size: Their pixels on a side.
        predict: Folder of pictures for the ``predict`` command.

    Raises:
        UserError: What cannot be found or read; one sentence.
    """

    train_collate = staticmethod(lists)
    eval_collate = staticmethod(lists)

    def __init__(
        self,
        root: str = "scenes",
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
        format: str | None = None,  # noqa: A002 (the key of the config)
        masks: bool = False,
        train_images: str | None = None,
        train_annotations: str | None = None,
        val_images: str | None = None,
        val_annotations: str | None = None,
        train_split: str = "train",
        val_split: str = "val",
        skip_empty: bool = True,
        hflip: float = 0.5,
        vflip: float = 0.0,
        jitter: list[float] | None = None,
        crop: int = 1024,
        photometric: bool = False,
        train_scenes: int = 1000,
        val_scenes: int = 200,
        scene_size: int = 128,
        predict: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedded = root == "scenes"
        self.num_workers = workers(num_workers, embedded=self.embedded)
        self.check_loading()
        self.sets = {}
        self._records: dict[str, list[Record]] = {}
        self.classes = self._read("val")
        self.num_classes = len(self.classes)

    def _read(self, split: str) -> list[str]:
        hp = self.hparams
        if self.embedded:
            count = hp.train_scenes if split == "train" else hp.val_scenes
            names, self._records[split] = scene_records(split, count, hp.scene_size)
            return names
        if not os.path.isdir(hp.root):
            raise UserError(
                f"data.root is {hp.root!r}, which is no directory. Give the folder of a COCO or VOC year, or 'scenes' for the "
                "rendered ones."
            )
        kind = hp.format or ("voc" if os.path.isdir(os.path.join(hp.root, "ImageSets")) else "coco")
        if kind == "voc":
            if hp.masks:
                raise UserError("Pascal VOC has no instance masks in COCO's sense: leave data.masks false.")
            names, self._records[split] = read_voc(hp.root, hp.train_split if split == "train" else hp.val_split)
        elif kind == "coco":
            folder = hp[f"{split}_images"] or f"{split}2017"
            file = hp[f"{split}_annotations"] or f"annotations/instances_{split}2017.json"
            names, self._records[split] = read_coco(os.path.join(hp.root, file), os.path.join(hp.root, folder))
        else:
            raise UserError(f"data.format is {kind!r} and must be 'coco' or 'voc'.")
        return names

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of "fit", "validate", "test" or "predict"."""
        hp = self.hparams
        if stage in ("fit", None) and "train" not in self.sets:
            names = self._read("train")
            if names != self.classes:
                other = next((pair for pair in zip(names, self.classes, strict=False) if pair[0] != pair[1]), ("more", "fewer"))
                raise UserError(f"The training and validation annotations name other classes: {other[0]!r} and {other[1]!r}.")
            augment = Augment(hp.hflip, hp.vflip, hp.jitter, hp.crop, hp.photometric)
            records = self._records["train"]
            self.sets["train"] = Annotated(records, augment, masks=hp.masks, training=True, skip_empty=hp.skip_empty)
            self.enough()
        if stage == "predict":
            if hp.predict is None or not os.path.isdir(hp.predict):
                raise UserError(f"data.predict is {hp.predict!r}: give --data.predict FOLDER of pictures.")
            self.sets["predict"] = Annotated(folder_records(hp.predict), plain, exif=True)
            return
        for split in ("test",) if stage == "test" else ("val",):
            self.sets.setdefault(split, Annotated(self._records["val"], plain, masks=hp.masks))
