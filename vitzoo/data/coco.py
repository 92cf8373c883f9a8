"""Annotated pictures: COCO files, Pascal VOC folders and rendered scenes, as one kind of record.

What COCO's own tools do is done here: an annotation of a picture that the file does not list is left out, a crowd takes no
part in training and cannot be missed in evaluation, a box without area is evaluated and not trained on. What they would
stumble over is one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batches import Item, parts, reseed
from .errors import UserError
from .images import list_images, read_image
from .scenes import SHAPES, Scene, scenes

__all__ = ["VOC_CLASSES", "Annotated", "Boxes", "Record", "read_coco", "read_voc", "scene_records"]

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass
class Boxes:
    """What is known of the objects in a picture; the k-th entry of each list is the k-th object.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels.
        labels: from 1.
        crowd: a region of many objects, or one that is too difficult to count.
        area: in pixels.
        shapes: bool mask ``[H, W]``, polygons, or a run-length code; None where there is none.
        ids: of the annotations.
    """

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    shapes: list[Any] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)

    def trainable(self) -> list[int]:
        """Objects to learn from: no crowds, no boxes without area."""
        whole = ((x2 > x1 and y2 > y1) for x1, y1, x2, y2 in self.boxes)
        return [i for i, (ok, crowd) in enumerate(zip(whole, self.crowd, strict=True)) if ok and not crowd]


@dataclass
class Record:
    """A picture (a path, or the pixels themselves) and its objects."""

    picture: str | np.ndarray
    size: tuple[int, int] | None
    objects: Boxes
    number: int


def _load(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"The annotation file {path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON file ({error}): download it again, or give the annotations' file.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} has no list '{key}', which a COCO annotation file for detection has.")
    return content


def read_coco(annotations: str | Path, folder: str | Path) -> tuple[list[str], list[Record]]:
    """Read a COCO file of boxes and, where they are there, masks.

    Args:
        annotations: The JSON file.
        folder: Of the pictures that it names.

    Returns:
        Class names in the order of the category ids (label k + 1 is the k-th), and a record for every picture.

    Raises:
        UserError: No such file, no JSON, a list or an entry that is missing, a category that is not listed, a box that is
            not four numbers; one sentence that names file and annotation.
    """
    path = Path(annotations)
    content = _load(path)
    try:
        categories = sorted(content["categories"], key=lambda c: c["id"])
        labels = {c["id"]: i + 1 for i, c in enumerate(categories)}
        records = {
            image["id"]: Record(str(Path(folder) / image["file_name"]), (image["height"], image["width"]), Boxes(), image["id"])
            for image in content["images"]
        }
        names = [str(c["name"]) for c in categories]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: an entry of 'images' or 'categories' lacks {error}.") from error
    for number, entry in enumerate(content["annotations"]):
        name = entry.get("id", f"number {number}") if isinstance(entry, dict) else f"number {number}"
        where = f"{path}, annotation {name}"
        try:
            image, category, box = entry["image_id"], entry["category_id"], entry["bbox"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{where} lacks {error}.") from error
        if image not in records:
            continue  # as pycocotools does
        if category not in labels:
            raise UserError(f"{where} has category_id {category}, which 'categories' does not list.")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
            raise UserError(f"{where} has the bbox {box}, which should be four numbers: x, y, width, height.")
        x, y, width, height = (float(v) for v in box)
        objects = records[image].objects
        objects.boxes.append((x, y, x + width, y + height))
        objects.labels.append(labels[category])
        objects.crowd.append(bool(entry.get("iscrowd", 0)))
        objects.area.append(float(entry.get("area", width * height)))
        objects.shapes.append(entry.get("segmentation"))
        objects.ids.append(entry.get("id", number))
    return names, list(records.values())


def read_voc(root: str | Path, split: str) -> tuple[list[str], list[Record]]:
    """Read the boxes of a Pascal VOC folder (``JPEGImages/``, ``Annotations/``, ``ImageSets/Main/``).

    Difficult objects are crowds: not trained on, and neither missed nor counted in evaluation.

    Args:
        root: Of one year.
        split: "train", "val", "trainval" or "test".

    Returns:
        The twenty class names, and a record for every picture.

    Raises:
        UserError: A file is missing or is no XML, an object has no box or another class.
    """
    root = Path(root)
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise UserError(f"{listing} does not exist: data.root is the folder of one VOC year, such as VOCdevkit/VOC2012.")
    records = []
    labels = {name: i + 1 for i, name in enumerate(VOC_CLASSES)}
    for number, line in enumerate(line.split()[0] for line in listing.read_text().splitlines() if line.strip()):
        path = root / "Annotations" / f"{line}.xml"
        try:
            tree = ElementTree.parse(path).getroot()  # noqa: S314 (a data set of the user's own)
        except (OSError, ElementTree.ParseError) as error:
            raise UserError(f"{path} cannot be read as an annotation ({error}).") from error
        objects = Boxes()
        for found in tree.iter("object"):
            name = (found.findtext("name") or "").strip()
            if name not in labels:
                raise UserError(f"{path} has an object of class {name!r}, which is none of VOC's twenty.")
            try:
                x1, y1, x2, y2 = (float(found.findtext(f"bndbox/{key}") or "") for key in ("xmin", "ymin", "xmax", "ymax"))
            except ValueError as error:
                raise UserError(f"{path} has an object without a whole box.") from error
            box = (x1 - 1, y1 - 1, x2, y2)  # VOC counts pixels from 1, both ends included
            objects.boxes.append(box)
            objects.labels.append(labels[name])
            objects.crowd.append(found.findtext("difficult") == "1")
            objects.area.append((box[2] - box[0]) * (box[3] - box[1]))
            objects.shapes.append(None)
            objects.ids.append(len(objects.ids))
        records.append(Record(str(root / "JPEGImages" / f"{line}.jpg"), None, objects, number))
    return list(VOC_CLASSES), records


def scene_records(split: str, count: int, size: int) -> tuple[list[str], list[Record]]:
    """Rendered scenes: see :mod:`vitzoo.data.scenes`."""

    def record(number: int, scene: Scene) -> Record:
        boxes = [(float(a), float(b), float(c), float(d)) for a, b, c, d in scene.boxes]
        area = [float(mask.sum()) for mask in scene.masks]
        objects = Boxes(boxes, scene.labels.tolist(), [False] * len(boxes), area, list(scene.masks), list(range(len(boxes))))
        return Record(scene.image, (size, size), objects, number)

    return list(SHAPES), [record(i, s) for i, s in enumerate(scenes(split, count, size))]


def folder_records(folder: str | Path) -> list[Record]:
    """Every picture below a folder, without annotations."""
    return [Record(path, None, Boxes(), i) for i, path in enumerate(list_images(folder))]


def _mask(shape: Any, height: int, width: int, where: str) -> np.ndarray:
    """Bool ``[height, width]`` of a mask, polygons or a run-length code."""
    if isinstance(shape, np.ndarray):
        return shape
    from pycocotools import mask as codes

    try:
        if isinstance(shape, list):
            if not shape or any(not isinstance(part, list) or len(part) < 6 or len(part) % 2 for part in shape):
                raise ValueError("a polygon is a list of at least three points")
            code = codes.merge(codes.frPyObjects(shape, height, width))
        else:
            counts, size = shape["counts"], shape["size"]
            if list(size) != [height, width]:
                raise ValueError(f"its size is {size} and the picture's [{height}, {width}]")
            code = codes.frPyObjects(shape, height, width) if isinstance(counts, list) else dict(shape)
        return codes.decode(code).astype(bool)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where}: its segmentation cannot be read ({error}).") from error


class Annotated(Dataset):
    """Pictures with objects: ``(image, target)``, the image uint8 ``[3, H, W]`` before the transform.

    The target holds ``boxes`` ``[n, 4]``, ``labels`` ``[n]``, ``image_id``, ``masks`` bool ``[n, H, W]`` where asked for and,
    in evaluation, ``iscrowd`` and ``area``.

    Args:
        records: The pictures.
        transform: Of (image, target).
        masks: Whether the target holds masks.
        training: Leave out crowds, boxes without area and, with ``skip_empty``, pictures that then hold nothing.
        skip_empty: See above.
        exif: As for :func:`vitzoo.data.read_image`; COCO's annotations are of the pixels as they are stored.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: Callable[[Tensor, dict[str, Any]], tuple[Tensor, dict[str, Any]]],
        *,
        masks: bool = False,
        training: bool = False,
        skip_empty: bool = True,
        exif: bool = False,
    ) -> None:
        self.transform, self.masks, self.training, self.exif = transform, masks, training, exif
        self.records = [r for r in records if not (training and skip_empty) or r.objects.trainable()]

    def __len__(self) -> int:
        return len(self.records)

    def pixels(self, index: int) -> np.ndarray:
        """The picture, uint8 ``[H, W, 3]``."""
        picture = self.records[index].picture
        return picture if isinstance(picture, np.ndarray) else np.array(read_image(picture, exif=self.exif))

    def target(self, index: int, height: int, width: int) -> dict[str, Any]:
        """What is known of a picture of this size."""
        record = self.records[index]
        objects = record.objects
        chosen = objects.trainable() if self.training else list(range(len(objects.boxes)))
        boxes = torch.tensor([objects.boxes[i] for i in chosen], dtype=torch.float32).reshape(-1, 4)
        labels = torch.tensor([objects.labels[i] for i in chosen], dtype=torch.int64)
        target: dict[str, Any] = {"boxes": boxes, "labels": labels, "image_id": record.number}
        if self.masks:
            if record.size is not None and record.size != (height, width):
                raise UserError(
                    f"{record.picture} has {height}x{width} pixels and its annotation says {record.size[0]}x{record.size[1]}: "
                    "the masks are of another picture."
                )
            target["masks"] = torch.zeros(len(chosen), height, width, dtype=torch.bool)
            for row, i in enumerate(chosen):
                where = f"annotation {objects.ids[i]} of {record.picture if isinstance(record.picture, str) else 'a scene'}"
                if objects.shapes[i] is None:
                    raise UserError(f"{where} has no segmentation, which instance segmentation needs: train a box detector.")
                target["masks"][row] = torch.from_numpy(_mask(objects.shapes[i], height, width, where))
        if not self.training:
            target["iscrowd"] = torch.tensor([objects.crowd[i] for i in chosen], dtype=torch.int64)
            target["area"] = torch.tensor([objects.area[i] for i in chosen], dtype=torch.float32)
        return target

    def __getitem__(self, item: int | tuple[int, int] | Item) -> tuple[Tensor, dict[str, Any]]:
        index, seed, _ = parts(item)
        if seed is not None:
            reseed(seed)
        pixels = self.pixels(index)
        image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        return self.transform(image, self.target(index, pixels.shape[0], pixels.shape[1]))
