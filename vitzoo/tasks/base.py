"""What every task does alike: seeds by the step, timm's optimiser and schedule by update, averaging, checks of checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from timm.optim import list_optimizers
from timm.utils import adaptive_clip_grad
from torch import Tensor
from torch.optim import Optimizer

from vitzoo.data.batches import mix, reseed
from vitzoo.data.errors import UserError, among, within
from vitzoo.tasks.optim import SCHEDULES, build_optimizer, build_schedule, scaled, updates_per_epoch
from vitzoo.tasks.sharding import shard

__all__ = ["Task"]


class Task(LightningModule):
    """A LightningModule whose hyperparameters hold the optimiser's and the schedule's keys of :class:`Classification`.

    Attributes:
        FIGURES: what validation logs (``val/<key>``), with its name in print; the first one chooses the best checkpoint.
        CURVES: figures that have a column in ``metrics.csv``, in this order.
        IDENTITY: hyperparameters that a checkpoint must share with the run that loads it, with what they are in words.
        last_loss: of the latest step, detached: the bar and the history read it.
    """

    FIGURES: ClassVar[dict[str, str]] = {}
    CURVES: ClassVar[tuple[str, ...]] = ()
    IDENTITY: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.last_loss: Tensor | None = None
        self._first_bad: Tensor | None = None
        self._sharded = False

    @property
    def title(self) -> str:
        """What is trained, in a few words."""
        raise NotImplementedError

    def start_counting(self) -> None:
        """Reset the metrics before an evaluation."""
        raise NotImplementedError

    def count_batch(self, batch: Any) -> None:
        """Put a batch of held-out pictures into the metrics."""
        raise NotImplementedError

    def computed(self) -> dict[str, Tensor]:
        """What the metrics say, by the names in ``FIGURES``; every process takes part."""
        raise NotImplementedError

    def evaluated(self) -> int:
        """Pictures of the last evaluation; every process takes part."""
        raise NotImplementedError

    def draw_result(self, rows: list[dict[str, Any]], classes: list[str], title: str, path: Path) -> None:
        """Draw the picture of a run, after :meth:`evaluated`."""
        raise NotImplementedError

    def record(self, folder: Path, stage: str) -> None:
        """Leave tables and pictures of the last evaluation, ``<stage>_...``, in a folder; every process takes part."""

    def published_fits(self, data: Any) -> None:
        """Raise UserError where published weights alone cannot do the task on this data."""

    @staticmethod
    def predictions(folder: str) -> Callback:
        """What writes predictions into a folder; its ``summary()`` is one line."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Divide the model among the devices, where ``trainer.strategy`` is "fsdp2"."""
        mesh = self.device_mesh
        if mesh is None or self._sharded:
            return
        if self.hparams.ema is not None:
            raise UserError("model.ema averages whole weights, and this strategy divides them: leave one of the two out.")
        shard(self.model, mesh)
        self._sharded = True

    def finished(self, loss: Tensor, batch_idx: int) -> Tensor:
        """What a training step returns for the mean loss of its batch.

        Lightning divides by ``accumulate_grad_batches``; the last group of an epoch may have fewer batches, and its gradient
        is to be a mean too. A loss that is not finite ends the run: on the CPU before anything is learned from it, on a
        device within ``trainer.log_every_n_steps`` batches (nothing waits for the device before) and before any checkpoint.

        Args:
            loss: A scalar.
            batch_idx: Of Lightning, in this epoch.

        Returns:
            The loss to go back from.
        """
        self.last_loss = loss.detach()
        if self._trainer is None:
            return loss
        trainer, at = self.trainer, self.trainer.fit_loop.epoch_loop.total_batch_idx
        bad = ~torch.isfinite(self.last_loss)
        before = self._first_bad if self._first_bad is not None else torch.full_like(self.last_loss, -1, dtype=torch.long)
        self._first_bad = torch.where(bad & (before < 0), at, before)
        if (self.device.type == "cpu" and trainer.world_size == 1) or batch_idx % trainer.log_every_n_steps == 0:
            self.check_finite()
        several = trainer.accumulate_grad_batches
        group = min(several, trainer.num_training_batches - batch_idx // several * several)
        return loss if group == several else loss * (several / group)

    def check_finite(self) -> None:
        """Raise UserError where a loss since the last call was not finite; with several processes all of them call this."""
        if self._first_bad is None:
            return
        mine = int(self._first_bad)
        if not self.trainer.strategy.reduce_boolean_decision(mine >= 0, all=False):
            return
        from vitzoo.tasks.faults import not_finite

        raise UserError(not_finite(self, mine))

    def on_validation_epoch_start(self) -> None:
        """Count from zero."""
        self.start_counting()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch."""
        self.count_batch(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the figures as ``val/...``; the metrics reduce over processes themselves."""
        self._log_counted("val")

    def on_test_epoch_start(self) -> None:
        """Count from zero."""
        self.start_counting()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Count a batch."""
        self.count_batch(batch)

    def on_test_epoch_end(self) -> None:
        """Log the figures as ``test/...``."""
        self._log_counted("test")

    def _log_counted(self, stage: str) -> None:
        self.log_dict({f"{stage}/{key}": value.float() for key, value in self.computed().items()}, sync_dist=False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout, drop path and mixup by the step, so that a resumed run draws what it would have drawn."""
        data = getattr(self.trainer, "datamodule", None)
        seed = data.hparams.seed if data is not None else 0
        step = mix(seed, "step", self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)
        reseed(step, devices=self.device.type != "cpu")

    def update_batch(self) -> int:
        """Pictures that an optimiser's update sees, over all devices."""
        return self.trainer.datamodule.hparams.batch_size * self.trainer.accumulate_grad_batches

    def learning_rates(self) -> dict[str, float]:
        """``lr``, ``warmup_lr`` and ``min_lr`` after scaling."""
        hp = self.hparams
        batch, rule = self.update_batch(), hp.get("lr_rule", "linear")
        return {key: scaled(hp[key], batch, hp.lr_batch, rule) for key in ("lr", "warmup_lr", "min_lr")}

    def make_optimizer(self, lr: float) -> Optimizer:
        """timm's optimiser over ``self.model``."""
        hp = self.hparams
        return build_optimizer(self.model, hp.optimizer, lr, hp.weight_decay, hp.layer_decay, dict(hp.optimizer_kwargs))

    def check_recipe(self) -> None:
        """Raise UserError for numbers and names that no recipe can have."""
        hp = self.hparams
        within("model.lr", hp.lr, 0, open_low=True)
        for key in ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs"):
            within(f"model.{key}", hp[key], 0)
        within("model.lr_batch", hp.lr_batch, 1)
        within("model.layer_decay", hp.layer_decay, 0, 1, open_low=True)
        within("model.ema", hp.ema, 0, 1)
        within("model.drop_path", hp.drop_path, 0, 0.999)
        within("model.decay_epochs", hp.decay_epochs, 0, open_low=True)
        among("model.schedule", hp.schedule, SCHEDULES)
        among("model.optimizer", hp.optimizer.lower().removeprefix("lookahead_"), list_optimizers())

    def configure_optimizers(self) -> dict[str, Any]:
        """timm's optimiser and its schedule by update."""
        hp, rates, trainer = self.hparams, self.learning_rates(), self.trainer
        within("trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1)
        try:
            optimizer = self.make_optimizer(rates["lr"])
        except (TypeError, ValueError) as error:
            given = f" with {dict(hp.optimizer_kwargs)}" if hp.optimizer_kwargs else ""
            raise UserError(f"model.optimizer {hp.optimizer!r}{given}: {error}") from error
        # not trainer.estimated_stepping_batches: it makes the training loader before the loops are restored
        per_epoch = updates_per_epoch(trainer.datamodule.epoch_batches(), trainer.accumulate_grad_batches)
        epochs = trainer.max_epochs
        if epochs is None or epochs < 0:
            raise UserError("The schedule ends with the run: give --trainer.max_epochs.")
        if trainer.fast_dev_run:
            epochs = math.ceil(hp.warmup_epochs + hp.cooldown_epochs) + 1
        if hp.cooldown_epochs >= epochs:
            raise UserError(
                f"model.cooldown_epochs {hp.cooldown_epochs:g} are part of trainer.max_epochs {epochs} and leave nothing "
                "before them: fewer, such as --model.cooldown_epochs 0."
            )
        schedule = build_schedule(
            optimizer,
            hp.schedule,
            epochs=epochs,
            per_epoch=per_epoch,
            warmup_epochs=hp.warmup_epochs,
            cooldown_epochs=hp.cooldown_epochs,
            warmup_lr=rates["warmup_lr"],
            min_lr=rates["min_lr"],
            warmup_prefix=hp.warmup_prefix,
            decay_epochs=hp.decay_epochs,
            decay_rate=hp.decay_rate,
            milestones=hp.get("milestones", ()),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """timm's schedules take the number of updates done."""
        scheduler.step(self.global_step)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by ``trainer.gradient_clip_val``, or adaptively by ``agc``."""
        factor = self.hparams.get("agc")
        if factor is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if gradient_clip_val is not None:
            raise UserError("model.agc and trainer.gradient_clip_val both clip gradients: give one of them.")
        heads: Any = self.model.get_classifier()
        found = heads if isinstance(heads, (tuple, list)) else [heads]
        spared = {id(p) for head in found for p in head.parameters()}
        learned = [p for p in self.model.parameters() if p.grad is not None and id(p) not in spared]
        adaptive_clip_grad(learned, clip_factor=factor)

    def configure_callbacks(self) -> list[Callback]:
        """Weight averaging, where ``ema`` asks for it."""
        fitting = self.trainer.state.fn == "fit"
        return [EMAWeightAveraging(decay=self.hparams.ema)] if fitting and self.hparams.ema is not None else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the names of the classes beside the weights."""
        checkpoint["classes"] = list(getattr(self.trainer.datamodule, "classes", []))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or of other classes, before its tensors do not fit."""
        theirs, ours = checkpoint.get("hyper_parameters", {}), self.hparams
        for key, what in self.IDENTITY.items():
            if theirs.get(key, ours[key]) != ours[key]:
                way_out = "--data.root" if key == "num_classes" else f"--model.{key}"
                raise UserError(
                    f"The checkpoint holds {what} {theirs[key]} and this run has {ours[key]}. Give {way_out} as it was when "
                    "it was trained."
                )
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if "state_dict" in checkpoint:  # a strategy that divides the weights has loaded them itself
            self._tensors_fit(checkpoint["state_dict"])
        stored, present = checkpoint.get("classes"), list(getattr(data, "classes", []))
        if stored and present and stored != present:
            other = next(i for i, pair in enumerate(zip(stored, present, strict=True)) if pair[0] != pair[1])
            raise UserError(
                f"The checkpoint's class {other} is {stored[other]!r}, the data's is {present[other]!r}: the classes' "
                "names must be those it was trained on."
            )

    def _tensors_fit(self, theirs: dict[str, Tensor]) -> None:
        ours = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        wrong = [key for key in {**ours, **theirs} if ours.get(key) != (tuple(theirs[key].shape) if key in theirs else None)]
        if wrong:
            key = wrong[0]
            here, there = ours.get(key, "missing"), tuple(theirs[key].shape) if key in theirs else "missing"
            raise UserError(
                f"The checkpoint is of another model: {len(wrong)} of {len(ours)} tensors differ, the first is {key}, {there} "
                f"there and {here} here. Give --model.name and --model.kwargs as they were when it was trained."
            )
