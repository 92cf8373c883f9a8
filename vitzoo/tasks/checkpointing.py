"""Checkpoints from which a run goes on exactly, written so that a crash never harms the one before."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from vitzoo.data.errors import UserError
from vitzoo.tasks.progress import say
from vitzoo.tasks.stopping import StopRequest, any_process

__all__ = ["AtomicCheckpointIO", "Checkpoints"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: the target is always a whole file.

    Lightning's own serialises into memory and moves a file in from the system's temporary folder, which across file
    systems is a copy. Loading never unpickles code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, creating its folder; UserError where the disk does not take it."""
        path = Path(path)
        beside = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            self._flush_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            kept = f"the one written before, {path}, is whole" if path.exists() else "none was written before"
            try:
                beside.unlink(missing_ok=True)
            except OSError as other:
                kept += f" ({beside.name} could not be removed: {other.strerror})"
            raise UserError(
                f"The checkpoint could not be written to {path.parent} ({' '.join(str(error).split())}); {kept}. Make room "
                "or give another --out, and go on with --ckpt_path."
            ) from error

    @staticmethod
    def _flush_folder(folder: Path) -> None:
        """The rename itself must survive a power failure too; not every file system lets a folder be opened."""
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:
            return
        try:
            os.fsync(descriptor)
        except OSError:
            pass
        finally:
            os.close(descriptor)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Read tensors and plain values only, whatever ``weights_only`` says.

        Args:
            path: The file.
            map_location: Device of the tensors.
            weights_only: Ignored.

        Returns:
            The checkpoint of a run.

        Raises:
            UserError: The file is damaged, holds what could run code, or is not the checkpoint of a run.
        """
        try:
            found = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            with open(path, "rb") as file:
                pickled = file.read(1) in (b"P", b"\x80")  # a zip of torch.save, or the older format
            what = "holds objects whose loading could run code, so it was not loaded" if pickled else "is no checkpoint"
            raise UserError(f"{path} {what}. Give a checkpoint that a run of train.py wrote.") from error
        except Exception as error:  # a damaged file makes torch raise RuntimeError, EOFError, KeyError, UnicodeDecodeError, ...
            raise UserError(
                f"{path} cannot be read as a checkpoint ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
                "It is damaged or no checkpoint: give another --ckpt_path."
            ) from error
        if not isinstance(found, Mapping) or not {"state_dict", "pytorch-lightning_version", "loops"} <= found.keys():
            raise UserError(
                f"{path} holds no run of train.py. To start a new run from the weights in it, give --model.weights {path}."
            )
        return found


class Checkpoints(Checkpoint):
    """``last.ckpt`` every so many updates and at the end, ``best.ckpt`` after each better validation.

    ``last.ckpt`` is written only where a run can go on bit for bit: never while a gradient is half accumulated (it would
    be lost) and never on an epoch's last batch (Lightning's counters then restart in two ways, and a second resume read
    wrong batches). What comes between an epoch's last-but-one batch and the next epoch's first is done again after a
    crash, the validation too; so an epoch that took more than a minute is saved before its last update. A run whose epochs
    are a single update is saved at its end only. ``best.ckpt`` is written at an epoch's end, where a run does not go on
    exactly (tried: other weights), so training refuses it.

    SIGTERM and SIGUSR1 end the run at the next such batch, saved (:class:`vitzoo.tasks.stopping.StopRequest`). No
    checkpoint is written from a loss that is not finite.

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
        self._stop = StopRequest()
        self._batches, self._due = 0, False

    @property
    def best_model_path(self) -> str:
        """Where the best checkpoint lies; Lightning's ``ckpt_path="best"`` asks for it."""
        return str(self.folder / "best.ckpt") if self.best is not None else ""

    def kept(self) -> str:
        """How to go on after a stop, in words."""
        last = self.folder / "last.ckpt"
        return f"--ckpt_path last goes on from {last}" if last.exists() else "no last.ckpt was written yet"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count updates from here; UserError where a ``best.ckpt`` was loaded."""
        if self._loaded == "best.ckpt":
            raise UserError(
                "This checkpoint was written after a validation, to be evaluated; training goes on to the same bits only "
                "from a last.ckpt: --ckpt_path last, or the last.ckpt beside it."
            )
        self._saved_update, self._saved_at = trainer.global_step, time.monotonic()
        self._stop.listen(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` where it is due and safe; end there where the machine asks for it."""
        self._batches += 1
        asked = self._stop.agreed(trainer)
        late = any_process(trainer, time.monotonic() - self._saved_at > 60 * self.minutes, self._batches)
        due = late or trainer.global_step - self._saved_update >= self.every
        left = trainer.num_training_batches - batch_idx - 1
        if left <= trainer.accumulate_grad_batches:  # the last safe batch before a validation
            due = due or any_process(trainer, time.monotonic() - self._saved_at > 60, 0)
        self._due = self._due or due or asked
        loop = trainer.fit_loop.epoch_loop
        if self._due and not loop._should_accumulate() and not loop.batch_progress.is_last_batch:
            self._save(trainer, "last.ckpt")
            if asked:
                self._stop.stop(trainer, self.kept())

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End a training run in its validation without a word more to the disk: no exact continuation starts here."""
        if trainer.state.fn == "fit" and self._stop.signum is not None:
            self._stop.stop(trainer, self.kept())

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
            say(f"\nstopped after {trainer.global_step} updates; {self.kept()}")

    def _save(self, trainer: Trainer, name: str) -> None:
        if trainer.fast_dev_run:
            return
        trainer.lightning_module.check_finite()
        if name == "last.ckpt":
            self._saved_update, self._saved_at, self._due = trainer.global_step, time.monotonic(), False
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
