"""What a run shows while it goes: a bar in a terminal, a line an epoch elsewhere."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn, TextColumn
from lightning.pytorch.utilities import rank_zero_only

from vitzoo.tasks.history import History

__all__ = ["Bar", "Lines", "Throughput", "clock", "say"]


@rank_zero_only
def say(text: str) -> None:
    """Print a line, at once and from the first process only."""
    print(text, flush=True)  # noqa: T201 (the command line speaks)


def clock(seconds: float) -> str:
    """``0:07``, ``12:30`` or ``3:04:05``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Pace:
    """Batches done in this process and the time they took, validation included."""

    def start(self, trainer: Trainer) -> None:
        self.began, self.first = time.monotonic(), trainer.fit_loop.epoch_loop.total_batch_idx

    def left(self, trainer: Trainer) -> float:
        """Seconds until the run ends, at the pace so far."""
        done = trainer.fit_loop.epoch_loop.total_batch_idx
        total = trainer.num_training_batches * (trainer.max_epochs or 0) - 1
        if trainer.max_steps >= 0:
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches - 1)
        return max(0.0, (total - done) * (time.monotonic() - self.began) / max(1, done - self.first))


class Bar(RichProgressBar):
    """Rich bar with loss, last validation's figure, images per second and time left of the run; fits 80 columns."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=4)
        self._pace, self._at, self._batches = _Pace(), 0.0, 0
        self._shown: dict[str, Any] = {}

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Description, bar and batches; the figures follow."""
        return [
            TextColumn("[progress.description]{task.description}"),
            CustomBarColumn(bar_width=16, complete_style="cyan", finished_style="cyan", pulse_style="cyan"),
            BatchesProcessedColumn(style=""),
        ]

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}/{self.trainer.max_epochs}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._pace.start(trainer)
        self._at = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The figures, read from the device at most twice a second."""
        self._batches += trainer.training
        now = time.monotonic()
        if now - self._at < 0.5 or pl_module.last_loss is None:
            return self._shown
        speed = trainer.datamodule.hparams.batch_size * self._batches / (now - self._at)
        key, label = next(iter(pl_module.FIGURES.items()))
        best = trainer.callback_metrics.get(f"val/{key}")
        self._shown = {"loss": f"{float(pl_module.last_loss):.3f}"}
        if best is not None:
            self._shown[label] = f"{float(best):.3f}"
        self._shown |= {"img/s": f"{speed:.0f}", "left": clock(self._pace.left(trainer))}
        self._at, self._batches = now, 0
        return self._shown


class Lines(Callback):
    """The same figures, a line an epoch, where standard output is a file or a pipe."""

    def __init__(self, history: History) -> None:
        super().__init__()
        self._history, self._pace = history, _Pace()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._pace.start(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's row; :class:`History` comes before this in the list of callbacks."""
        if not self._history.rows:
            return
        row = self._history.rows[-1]
        key, label = next(iter(pl_module.FIGURES.items()))
        value = row[f"val_{key}"]
        figure = f"  {label} {value:.4f}" if value is not None else ""
        say(
            f"epoch {row['epoch'] + 1}/{trainer.max_epochs}  loss {row['train_loss']:.3f}{figure}  "
            f"{row['images_per_second']:.0f} img/s  {clock(self._pace.left(trainer))} left"
        )


class Throughput(Callback):
    """Pictures a second of the last evaluation over all processes, loading included, the first batch left out where it can be.

    Attributes:
        images_per_second: None before an evaluation.
    """

    images_per_second: float | None = None

    def _start(self, *_: Any) -> None:
        self._pictures, self._since, self._batches = 0, time.perf_counter(), 0

    def _count(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, *_: Any) -> None:
        self._pictures, self._batches = self._pictures + len(batch[0]), self._batches + 1
        if self._batches == 1:
            self._first = self._pictures, time.perf_counter()

    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._pictures:
            return
        before, since = self._first if self._batches > 1 else (0, self._since)
        # the figures are computed by now, so a device has finished
        self.images_per_second = trainer.world_size * (self._pictures - before) / max(1e-9, time.perf_counter() - since)

    on_validation_epoch_start = on_test_epoch_start = _start
    on_validation_batch_end = on_test_batch_end = _count
    on_validation_end = on_test_end = _end
