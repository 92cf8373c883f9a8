"""Write what a model says about a folder of pictures."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image

from vitzoo.tasks.draw import draw_boxes, draw_classes

__all__ = ["ClassMaps", "FoundObjects", "Predictions"]


class Predictions(Callback):
    """Writes ``predictions.csv``: path, class, probability; both empty where a file could not be read.

    With several processes each writes its own part, ``predictions-0.csv`` and so on.

    Args:
        folder: Where.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "predictions.csv"
        self.rows: list[tuple[str, str, str]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch."""
        paths, classes = trainer.datamodule.sets["predict"].paths, trainer.datamodule.classes
        for number, label, probability in zip(*(part.tolist() for part in outputs), strict=True):
            if number < 0:
                self.rows.append((paths[-1 - number], "", ""))
            else:
                self.rows.append((paths[number], classes[label], f"{probability:.4f}"))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, whole."""
        if trainer.world_size > 1:
            self.path = self.folder / f"predictions-{trainer.global_rank}.csv"
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".tmp")
        with open(beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "class", "probability"))
            writer.writerows(self.rows)
        os.replace(beside, self.path)

    def summary(self) -> str:
        """What was written, and where."""
        return f"{len(self.rows)} pictures; class and probability in {self.path}"


class FoundObjects(Callback):
    """Writes ``predictions.json``, COCO's format of results with ``file_name`` and class, and a drawn picture each.

    Args:
        folder: Of the JSON file; the pictures come into ``predictions/`` in it.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.rows: list[dict[str, Any]] = []
        self.pictures = 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw a batch and collect its rows."""
        images, classes = trainer.datamodule.sets["predict"], trainer.datamodule.classes
        drawn = self.folder / "predictions"
        drawn.mkdir(parents=True, exist_ok=True)
        for number, found in outputs:
            path = Path(images.records[number].picture)
            parts = {key: found[key].numpy() for key in ("boxes", "labels", "scores", "masks") if key in found}
            draw_boxes(images.pixels(number), **parts, classes=classes).save(drawn / f"{number:05d}_{path.stem}.png")
            self.pictures += 1
            for box, label, score in zip(
                found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
            ):
                x1, y1, x2, y2 = (round(v, 2) for v in box)
                row = {"image_id": number, "file_name": str(path), "category_id": label, "class": classes[label - 1]}
                self.rows.append({**row, "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)], "score": round(score, 5)})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file, whole."""
        name = "predictions.json" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / (name + ".tmp")
        beside.write_text(json.dumps(self.rows), encoding="utf-8")
        os.replace(beside, self.folder / name)

    def summary(self) -> str:
        """What was written, and where."""
        return (
            f"{self.pictures} pictures, {len(self.rows)} objects; {self.folder / 'predictions.json'}, "
            f"drawn in {self.folder / 'predictions'}/"
        )


class ClassMaps(Callback):
    """Writes two PNGs for each picture: class numbers, and colours over the picture.

    Args:
        folder: They come into ``predictions/`` in it.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder) / "predictions"
        self.pictures = 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch; the loader serves every ``world``-th picture in order."""
        images, classes = trainer.datamodule.sets["predict"], trainer.datamodule.classes
        self.folder.mkdir(parents=True, exist_ok=True)
        for labels in outputs:
            number = self.pictures * trainer.world_size + trainer.global_rank
            name = f"{number:05d}_{Path(images.pairs[number][0]).stem}"
            values = labels.numpy()
            Image.fromarray(values.astype("uint8" if len(classes) <= 256 else "uint16")).save(self.folder / f"{name}.png")
            draw_classes(images.pixels(number), values, classes).save(self.folder / f"{name}_drawn.png")
            self.pictures += 1

    def summary(self) -> str:
        """What was written, and where."""
        return f"{self.pictures} pictures; class numbers and colours in {self.folder}/"
