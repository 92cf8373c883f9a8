"""Write what a model says about a folder of pictures."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

__all__ = ["Predictions"]


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
