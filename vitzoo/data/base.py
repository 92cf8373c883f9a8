"""What every data module of the zoo does: batches by step, each held-out picture once, a position that can be resumed."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from .batches import StepBatches
from .errors import UserError, within

__all__ = ["StepData", "lists", "workers"]


def workers(asked: int | None, *, embedded: bool) -> int:
    """Loading processes: what was asked for; else none for data in memory, or one a core, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked if asked is not None else (0 if embedded else min(8, cores))


def lists(items: list[tuple[Any, ...]]) -> tuple[list[Any], ...]:
    """Collate pictures of different sizes: a list of each part of the items."""
    return tuple(list(part) for part in zip(*items, strict=True))


def _deaf(_: int) -> None:
    """A signal to stop that reaches the whole group of processes is the main one's to answer: it still needs its loaders."""

    def first(signum: int, _: Any) -> None:
        signal.signal(signum, signal.SIG_DFL)  # the second one ends the worker: a loader that closes insists

    signal.signal(signal.SIGTERM, first)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class StepData(LightningDataModule):
    """Loaders over ``self.sets``; a subclass fills that in ``setup`` and keeps ``batch_size`` and ``seed`` as hyperparameters.

    Attributes:
        classes: Names.
        num_classes: Their number, as the model is told.
        num_workers: Loading processes.
        sets: Data sets by split: "train", "val", "test", "predict".
        train_collate: Of training batches; None: torch's.
        eval_collate: Of the others.
    """

    classes: list[str]
    num_classes: int
    num_workers: int
    sets: dict[str, Any]
    train_collate: Any = None
    eval_collate: Any = None
    position = (0, 0)
    _saved_batches: int | None = None

    @property
    def world(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    @property
    def train_batches(self) -> int:
        """Steps in a whole epoch; known without building a loader, so that a schedule can be computed from it."""
        return len(self.sets["train"]) // self.hparams.batch_size

    def check_loading(self) -> None:
        """Raise UserError where the batch or the number of loading processes is none."""
        within("data.batch_size", self.hparams.batch_size, 1)
        within("data.num_workers", self.num_workers, 0)

    def enough(self) -> None:
        """Refuse a training set smaller than a batch."""
        if len(self.sets["train"]) < self.hparams.batch_size:
            raise UserError(
                f"data.batch_size is {self.hparams.batch_size}, and there are only {len(self.sets['train'])} training "
                f"pictures. Give --data.batch_size {max(1, len(self.sets['train']) // 4)} or less."
            )

    def train_dataloader(self) -> DataLoader:
        """Batches from the position of the checkpoint that was loaded, else from the start."""
        hp, world = self.hparams, self.world[1]
        if hp.batch_size % world:
            raise UserError(f"data.batch_size {hp.batch_size} counts all devices, and {world} devices do not divide it.")
        if self._saved_batches is not None and self._saved_batches != self.epoch_batches():
            raise UserError(
                f"The checkpoint was written in epochs of {self._saved_batches} steps, and now there are "
                f"{self.epoch_batches()}: go on with the same data and data.batch_size."
            )
        batches = self._batches(self.position)
        return DataLoader(self.sets["train"], batch_sampler=batches, collate_fn=self.train_collate, **self._loading())

    def _batches(self, position: tuple[int, int]) -> StepBatches:
        rank, world = self.world
        hp = self.hparams
        epochs = self.trainer.max_epochs if self.trainer is not None else None
        return StepBatches(
            len(self.sets["train"]),
            hp.batch_size,
            hp.seed,
            rank=rank,
            world=world,
            position=position,
            repeats=hp.get("repeats", 1),
            sizes=hp.get("sizes", ()),
            epochs=epochs if hp.get("progressive") else None,
        )

    def names_of(self, epoch: int, batch: int) -> list[str]:
        """The pictures that this process saw in a training batch: paths where there are files, else numbers."""
        train = self.sets["train"]
        order = self._batches((epoch, batch))
        order.set_epoch(epoch)
        name = getattr(train, "name", lambda index: f"training picture {index}")
        return [name(index) for index, _, _ in next(iter(order), [])]

    def epoch_batches(self) -> int:
        limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
        return int(self.train_batches * limit) if isinstance(limit, float) else min(limit, self.train_batches)

    def _evaluation(self, split: str) -> DataLoader:
        rank, world = self.world
        every = range(rank, len(self.sets[split]), world)  # each picture once, also where ``world`` does not divide
        size = max(1, self.hparams.batch_size // world)
        return DataLoader(self.sets[split], batch_size=size, sampler=every, collate_fn=self.eval_collate, **self._loading())

    def val_dataloader(self) -> DataLoader:
        """Each held-out picture once."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader:
        """Each picture of ``test/`` once, or of the held-out ones where there is no ``test/``."""
        return self._evaluation("test")

    def predict_dataloader(self) -> DataLoader:
        """Each picture below ``predict`` once, with its number instead of a label."""
        return self._evaluation("predict")

    def _loading(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": _deaf,
        }

    def state_dict(self) -> dict[str, int]:
        """Position of the next training batch, from the number of batches done (mid-epoch checkpoints, batch ended)."""
        if self.trainer is None or "train" not in self.sets:
            return {}
        per_epoch = self.epoch_batches()
        done = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        return {"epoch": done // per_epoch, "batch": done % per_epoch, "batches": per_epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start the next training loader at a saved position; called before any loader exists."""
        if state_dict:
            self.position = state_dict["epoch"], state_dict["batch"]
            self._saved_batches = state_dict["batches"]
