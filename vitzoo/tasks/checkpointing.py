"""Checkpoints from which a run goes on exactly, written so that a crash never harms the one before."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vitzoo.data.errors import UserError
from vitzoo.tasks.progress import say

__all__ = ["AtomicCheckpointIO", "Checkpoints"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: the target is always a whole file.

    Lightning's own serialises into memory and moves a file in from the system's temporary folder, which across file
    systems is a copy. Loading never unpickles code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, creating its folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Read tensors and plain values only, whatever ``weights_only`` says."""
        return torch.load(path, map_location=map_location, weights_only=True)


class Checkpoints(Checkpoint):
    """``last.ckpt`` every so many updates and at the end, ``best.ckpt`` after each better validation.

    ``last.ckpt`` is written only where a run can go on bit for bit: never while a gradient is half accumulated (it would
    be lost) and never on an epoch's last batch (Lightning's counters then restart in two ways, and a second resume read
    wrong batches). What comes between an epoch's last-but-one batch and the next epoch's first is done again after a
    crash, the validation too. A run whose epochs are a single update is therefore saved at its end only. ``best.ckpt``
    is written at an epoch's end, where a run does not go on exactly (tried: other weights), so training refuses it.

    Args:
        folder: Where.
        every: Updates between two ``last.ckpt``; the next safe batch is taken.
        minutes: Write as well when this long has passed.
        monitor: Figure of the validation to be highest in ``best.ckpt``.
    """

    def __init__(self, folder: str, every: int = 200, minutes: float = 10.0, monitor: str = "val/top1") -> None:
        super().__init__()
        self.folder, self.every, self.minutes, self.monitor = Path(folder), every, minutes, monitor
        self.best: float | None = None
        self.best_epoch: int | None = None
        self._saved_update, self._saved_at = 0, time.monotonic()
        self._writing, self._loaded = "", ""

    @property
    def best_model_path(self) -> str:
        """Where the best checkpoint lies; Lightning's ``ckpt_path="best"`` asks for it."""
        return str(self.folder / "best.ckpt") if self.best is not None else ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count updates from here; UserError where a ``best.ckpt`` was loaded."""
        if self._loaded == "best.ckpt":
            raise UserError(
                "This checkpoint was written after a validation, to be evaluated; training goes on to the same bits only "
                "from a last.ckpt: --ckpt_path last, or the last.ckpt beside it."
            )
        self._saved_update, self._saved_at = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` where it is due and safe."""
        due = trainer.global_step - self._saved_update >= self.every
        if not due and time.monotonic() - self._saved_at < 60 * self.minutes:
            return
        loop = trainer.fit_loop.epoch_loop
        if not loop._should_accumulate() and not loop.batch_progress.is_last_batch:
            self._save(trainer, "last.ckpt")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``best.ckpt`` where the figure is better than before."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if self.best is None or value > self.best:
            self.best, self.best_epoch = value, trainer.current_epoch
            self._save(trainer, "best.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the finished run's ``last.ckpt``."""
        self._save(trainer, "last.ckpt")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell someone who pressed Ctrl-C how to go on; nothing is saved in the middle of a step."""
        if isinstance(exception, KeyboardInterrupt):
            last = self.folder / "last.ckpt"
            kept = f"--ckpt_path last goes on from {last}" if last.exists() else "no last.ckpt was written yet"
            say(f"\nstopped after {trainer.global_step} updates; {kept}")

    def _save(self, trainer: Trainer, name: str) -> None:
        if trainer.fast_dev_run:
            return
        if name == "last.ckpt":
            self._saved_update, self._saved_at = trainer.global_step, time.monotonic()
        self._writing = name
        trainer.save_checkpoint(self.folder / name)
        for logger in trainer.loggers:
            logger.save()  # what was logged before the checkpoint will not be logged again

    def state_dict(self) -> dict[str, Any]:
        """Figure and epoch (from 0) of the best checkpoint, and which of the two this one is."""
        return {"best": self.best, "best_epoch": self.best_epoch, "name": self._writing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best before."""
        self.best, self.best_epoch, self._loaded = state_dict["best"], state_dict["best_epoch"], state_dict["name"]
