"""A small COCO data set with everything that is awkward in it."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

POLYGON = [[10, 10, 50, 10, 50, 40, 10, 40]]


def crowd_code(height, width, box):
    """Uncompressed run-length code of a rectangle x, y, w, h (column by column, zeros first)."""
    mask = np.zeros((height, width), bool)
    x, y, w, h = box
    mask[y : y + h, x : x + w] = True
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flat)).astype(int))).tolist() + [len(flat)]
    return {"counts": np.diff([0, *edges]).tolist(), "size": [height, width]}


def content():
    """Ids with gaps, a crowd, a box without area, a picture without annotation, an annotation without picture."""
    images = [{"id": 10 * (i + 1), "file_name": f"{i}.jpg", "height": 60 + 10 * i, "width": 80} for i in range(4)]

    def square(x, y, s):
        return [[x, y, x + s, y, x + s, y + s, x, y + s]]

    annotations = [
        {"id": 1, "image_id": 10, "category_id": 3, "bbox": [10, 10, 40, 30], "area": 1200.0,
         "segmentation": POLYGON},
        {"id": 2, "image_id": 10, "category_id": 7, "bbox": [0, 0, 20, 20], "area": 400,
         "segmentation": square(0, 0, 20)},
        {"id": 3, "image_id": 20, "category_id": 3, "bbox": [5, 5, 60, 40], "area": 2400, "iscrowd": 1,
         "segmentation": crowd_code(70, 80, (5, 5, 60, 40))},
        {"id": 4, "image_id": 20, "category_id": 3, "bbox": [30, 20, 0, 10], "area": 0,
         "segmentation": square(30, 20, 1)},
        {"id": 5, "image_id": 20, "category_id": 7, "bbox": [20, 30, 30, 30], "area": 900, "segmentation": square(20, 30, 30)},
        {"id": 6, "image_id": 30, "category_id": 3, "bbox": [30, 20, 12, 0], "area": 0,
         "segmentation": square(30, 20, 1)},
        {"id": 7, "image_id": 999, "category_id": 3, "bbox": [1, 1, 2, 2], "area": 4,
         "segmentation": square(1, 1, 2)},
    ]  # fmt: skip
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(root, found=None):
    """``root`` as a COCO year, the same pictures for training and validation."""
    found = found or content()
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(found))
        for i, image in enumerate(found["images"]):
            pixels = np.random.RandomState(i).randint(0, 255, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{split}2017" / image["file_name"])
    return root
