"""One row of figures an epoch, kept inside the checkpoint: what a resumed run writes is what an undisturbed one would."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

__all__ = ["History"]


class History(Callback):
    """Writes ``metrics.csv`` after each epoch and the training loss every ``trainer.log_every_n_steps`` to the loggers.

    The rows are part of every checkpoint and the file is written from them, so that a run which was killed and resumed
    has each epoch once. TensorBoard is told from which step on the earlier curve no longer counts.

    Args:
        folder: Of ``metrics.csv``.
        curves: Figures of the validation that have a column.
    """

    def __init__(self, folder: str, curves: Sequence[str] = ("loss", "top1", "top5")) -> None:
        super().__init__()
        self.curves = tuple(curves)
        self.path = Path(folder) / "metrics.csv"
        self.rows: list[dict[str, Any]] = []
        self._sum: torch.Tensor | float = 0.0
        self._count = 0
        self._before, self._clock = 0.0, time.perf_counter()  # seconds of this epoch in an earlier process; its start
        self._seen, self._since = 0, time.perf_counter()  # batches of this epoch in this process
        self._trained = self._since
        self._validated = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the clock; on a resumed run, void what TensorBoard holds from here on."""
        self._clock = self._since = time.perf_counter()
        for logger in trainer.loggers:
            if trainer.global_step > 0 and isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                start = Event(step=trainer.global_step, session_log=SessionLog(status=SessionLog.START))
                logger.experiment._get_file_writer().add_event(start, trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an epoch's sums; not called where an epoch is resumed."""
        self._sum, self._count, self._before, self._seen = 0.0, 0, 0.0, 0
        self._clock = self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of a step; nothing waits for the device."""
        self._sum = pl_module.last_loss + self._sum
        self._count += 1
        self._seen += 1
        self._trained = time.perf_counter()
        step = trainer.global_step
        if trainer.loggers and step % trainer.log_every_n_steps == 0 and not trainer.fit_loop._should_accumulate():
            loss = trainer.strategy.reduce(pl_module.last_loss, reduce_op="mean")  # of the whole batch, on all processes
            figures = {"train/loss": float(loss), "lr": _peak_lr(trainer)}
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this epoch's figures are its own; Lightning keeps those of the last validation."""
        if not trainer.sanity_checking:
            self._validated = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's row."""
        figures = {key: float(value) for key, value in trainer.callback_metrics.items()}
        batch = trainer.datamodule.hparams.batch_size
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": _peak_lr(trainer),
            "train_loss": float(trainer.strategy.reduce(torch.as_tensor(self._sum) / max(1, self._count), reduce_op="mean")),
            **{
                f"val_{key}": figures.get(f"val/{key}") if self._validated == trainer.current_epoch else None
                for key in self.curves
            },
            "seconds": round(self._before + time.perf_counter() - self._clock, 2),
            "images_per_second": round(batch * self._seen / max(1e-9, self._trained - self._since), 1),
        }
        self.rows = [old for old in self.rows if old["epoch"] < row["epoch"]] + [row]
        self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write ``metrics.csv`` whole, from the rows."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".tmp")
        with open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(beside, self.path)

    def state_dict(self) -> dict[str, Any]:
        """The rows, and the sums of the epoch under way."""
        seconds = self._before + time.perf_counter() - self._clock
        return {"rows": list(self.rows), "sum": float(self._sum), "count": self._count, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the middle of the saved epoch."""
        self.rows, self._sum = list(state_dict["rows"]), state_dict["sum"]
        self._count, self._before = state_dict["count"], state_dict["seconds"]


def _peak_lr(trainer: Trainer) -> float:
    return max(group["lr"] for group in trainer.optimizers[0].param_groups)
