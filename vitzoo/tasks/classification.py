"""Image classification: any model of the zoo or of timm, timm's recipe parts, torchmetrics' figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

import vitzoo
from vitzoo.data.errors import UserError, among, within
from vitzoo.tasks import tuning
from vitzoo.tasks.base import Task
from vitzoo.tasks.figures import Figures, class_rows, write_matrix, write_rows
from vitzoo.tasks.losses import build_loss, build_mixup
from vitzoo.tasks.predictions import Predictions
from vitzoo.tasks.report import draw, draw_answers
from vitzoo.tasks.teaching import KINDS, Teacher, TokenHead, distilled, places
from vitzoo.tasks.tuning import load_weights

__all__ = ["Classification"]


class Classification(Task):
    """Train and evaluate a classifier.

    Args:
        name: Model name, the zoo's or timm's.
        num_classes: Of the data; the command line takes it from there.
        pretrained: Start from published weights; a head for another number of classes starts new.
        weights: Start from this file: a checkpoint of a run, or weights in any layout that the zoo knows; tables and positions
            are resized where the image, the window or the kernel is another.
        kwargs: Further arguments of the model.
        drop_path: Stochastic depth; None: the model's default.
        optimizer: timm's name.
        lr: Peak learning rate, for ``lr_batch`` pictures an update where that is given.
        lr_batch: Scale ``lr``, ``warmup_lr`` and ``min_lr`` by (pictures an update / ``lr_batch``); None: do not.
        lr_rule: "linear" or "sqrt", of that scaling.
        weight_decay: Not on what the model's ``no_weight_decay`` names, nor on biases and norms.
        layer_decay: Factor of the rate from each layer to the one below; None: one rate.
        optimizer_kwargs: Such as ``betas``, ``eps``, ``momentum``.
        schedule: timm's name.
        warmup_epochs: Linear warm-up, counted in updates.
        warmup_lr: Where it starts.
        warmup_prefix: Start the decay's curve after the warm-up instead of cutting it.
        min_lr: Where the decay ends.
        cooldown_epochs: Epochs at ``min_lr`` at the end, part of ``trainer.max_epochs``.
        decay_epochs: Between the steps of schedule "step".
        decay_rate: Of schedule "step".
        loss: "ce" (softmax cross-entropy) or "bce" (a sigmoid for each class).
        bce_threshold: Soft labels above it count as 1 and others as 0, with "bce"; None: as they are.
        bce_sum: Sum "bce" over the classes instead of taking the mean.
        smoothing: Label smoothing.
        mixup: Alpha; 0: off.
        cutmix: Alpha; 0: off.
        mixup_prob: Probability of either in a batch.
        mixup_switch_prob: Probability of cutmix where both are on.
        mixup_mode: "batch", "pair" or "elem".
        agc: Clip gradients by this share of their weights' norms, a unit at a time, the head's not (Brock et al. 2021); None:
            by ``trainer.gradient_clip_val`` or not at all.
        tune: "all"; "head": the classifier alone; "lora": the classifier and low-rank additions (needs peft).
        frozen: Wildcards of parameter names not to train, such as ``stem.*``.
        lora_rank: Of the additions.
        lora_alpha: They are scaled by ``lora_alpha / lora_rank``.
        lora_targets: Last parts of the names of the Linears that get one, separated by "|".
        teacher: A model, the zoo's or timm's, to learn from as well; None: none.
        teacher_weights: A file of weights for it; None: its published ones.
        teacher_kwargs: Further arguments of it.
        teacher_size: Edge of the pictures that it is shown; None: as the student sees them.
        distill: "hard" (its decisions), "soft" (its probabilities) or "token" (its probabilities at each place of the map).
        distill_weight: Share of "hard" or "soft" in the loss; factor of "token", which is added.
        temperature: Of "soft".
        ema: Decay of the averaged weights; None: none. The average is what is evaluated and stored.
        compile: Run the model through ``torch.compile``.
        channels_last: Memory format of convolutions.
        grad_checkpointing: Recompute activations in the backward pass: less memory, more time.

    Raises:
        UserError: An unknown model (the nearest names are given), an argument that the model does not take.
    """

    FIGURES = {"top1": "top-1", "top5": "top-5", "loss": "loss", "ece": "calibration error"}
    CURVES = ("loss", "top1", "top5")
    IDENTITY = {"name": "the model", "num_classes": "a head for this number of classes:"}

    def __init__(
        self,
        name: str,
        num_classes: int,
        pretrained: bool = False,
        weights: str | None = None,
        kwargs: dict[str, Any] = {},  # noqa: B006 (never written; a dict is what YAML gives)
        drop_path: float | None = None,
        optimizer: str = "adamw",
        lr: float = 1e-3,
        lr_batch: int | None = None,
        lr_rule: str = "linear",
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        optimizer_kwargs: dict[str, Any] = {},  # noqa: B006
        schedule: str = "cosine",
        warmup_epochs: float = 5,
        warmup_lr: float = 1e-6,
        warmup_prefix: bool = False,
        min_lr: float = 1e-5,
        cooldown_epochs: float = 0,
        decay_epochs: float = 30,
        decay_rate: float = 0.1,
        loss: str = "ce",
        bce_threshold: float | None = None,
        bce_sum: bool = False,
        smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        mixup_mode: str = "batch",
        agc: float | None = None,
        tune: str = "all",
        frozen: list[str] = [],  # noqa: B006
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_targets: str = "qkv|q|kv|proj",
        teacher: str | None = None,
        teacher_weights: str | None = None,
        teacher_kwargs: dict[str, Any] = {},  # noqa: B006
        teacher_size: int | None = None,
        distill: str = "soft",
        distill_weight: float = 0.5,
        temperature: float = 1.0,
        ema: float | None = None,
        compile: bool = False,  # noqa: A002 (the key of the config)
        channels_last: bool = False,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.check_recipe()
        for key in ("smoothing", "mixup_prob", "mixup_switch_prob", "distill_weight"):
            within(f"model.{key}", self.hparams[key], 0, 1)
        for key in ("mixup", "cutmix"):
            within(f"model.{key}", self.hparams[key], 0)
        among("model.mixup_mode", mixup_mode, ("batch", "pair", "elem", "half"))
        within("model.temperature", temperature, 0, open_low=True)
        within("model.agc", agc, 0, open_low=True)
        within("model.lora_rank", lora_rank, 1)
        extra = dict(kwargs) if drop_path is None else {**kwargs, "drop_path_rate": drop_path}
        self.model: Any = _create(name, pretrained and weights is None, num_classes, extra)
        if weights is not None:
            _start_from(weights, self.model)
        tuning.tune(self.model, tune, frozen, lora_rank, lora_alpha, lora_targets)
        self.teacher: Teacher | None = None
        self.token_head: TokenHead | None = None
        if teacher is not None:
            among("model.distill", distill, KINDS)
            if distill == "token":
                self.token_head = TokenHead(cast(Any, self.model).num_features, num_classes)
            if hasattr(self.model, "set_distilled_training"):
                cast(Any, self.model).set_distilled_training(distill != "token")
        if grad_checkpointing:
            cast(Any, self.model).set_grad_checkpointing(True)
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if compile:
            self.model.compile()
        self.mixup = build_mixup(mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_mode, smoothing, num_classes)
        mixed = self.mixup is not None
        self.loss = build_loss(loss, smoothing, mixed=mixed, threshold=bce_threshold, summed=bce_sum)
        self.figures = Figures(num_classes, sigmoid=loss == "bce")
        self._met = 0

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of images ``[B, C, H, W]``."""
        if self.hparams.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.model(images)

    def setup(self, stage: str) -> None:
        """Refuse a model and data that do not belong together; one sentence each."""
        data = getattr(self.trainer, "datamodule", None)
        classes, hp = getattr(data, "num_classes", self.hparams.num_classes), self.hparams
        if stage == "fit" and hp.teacher is not None and self.teacher is None:
            self.teacher = Teacher(hp.teacher, hp.teacher_weights, hp.num_classes, dict(hp.teacher_kwargs), hp.teacher_size)
        if classes != hp.num_classes:
            raise UserError(
                f"The model has num_classes={hp.num_classes} and the data has {classes} classes. "
                f"Make the model with num_classes={classes}."
            )
        if stage == "fit" and self.mixup is not None and data is not None:
            share = data.hparams.batch_size // self.trainer.world_size
            if share % 2:
                raise UserError(
                    f"mixup and cutmix pair the pictures of a batch, and {share} on a device is odd. "
                    f"Give --data.batch_size {(share + 1) * self.trainer.world_size}, or turn both off."
                )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch: images ``[B, C, H, W]``, labels ``[B]``."""
        images, labels = batch
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        if hasattr(self.model, "set_epoch"):  # a part of the model changes with the training, such as a keep rate
            self.model.set_epoch(self.current_epoch + batch_idx / max(1, self.trainer.num_training_batches))
        logits, loss = self._learn(images, labels)
        if hasattr(self.model, "extra_loss"):  # what a part of the model learns beside the labels
            extra = self.model.extra_loss(images, labels, logits)
            loss = loss if extra is None else loss + extra
        return self.finished(loss, batch_idx)

    def _learn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the loss with what the teacher adds."""
        hp = self.hparams
        if self.teacher is not None and self.token_head is not None:
            final, maps = self.model.forward_intermediates(images, indices=1, norm=True)
            logits = self.model.forward_head(final)
            dense = places(self.token_head(maps[-1]), self.teacher.of_places(images))
            return logits, self.loss(logits, labels) + hp.distill_weight * dense
        found = self(images)
        logits, pupil = found if isinstance(found, tuple) else (found, found)
        loss = self.loss(logits, labels)
        if self.teacher is not None:
            said = distilled(pupil, self.teacher(images), hp.distill, hp.temperature)
            loss = (1 - hp.distill_weight) * loss + hp.distill_weight * said
        return logits, loss

    def on_train_start(self) -> None:
        """Put what is frozen into eval mode, and show the teacher how pictures are normalised."""
        for module in tuning.resting(self.model):
            module.eval()
        if self.teacher is not None:
            config = self.trainer.datamodule.data_config()
            self.teacher.to(self.device, config["mean"], config["std"])

    def start_counting(self) -> None:
        """Forget the evaluation before."""
        self.figures.reset()
        self._met = 0

    def count_batch(self, batch: tuple[Tensor, Tensor]) -> None:
        """Logits of a batch, with the number of each picture in the set."""
        images, labels = batch
        world = self.trainer.world_size if self._trainer is not None else 1
        numbers = self.global_rank + world * (self._met + torch.arange(len(labels)))  # as StepData serves them
        self._met += len(labels)
        self.figures.update(self(images), labels, numbers)

    def computed(self) -> dict[str, Tensor]:
        """top1, top5, loss and ece."""
        return self.figures.compute()

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Picture number (-1 - number where unreadable), most probable class and its probability, each ``[B]``."""
        images, numbers = batch
        logits = self(images).float()
        probability = logits.softmax(-1) if self.hparams.loss == "ce" else logits.sigmoid()
        best, label = probability.max(-1)
        return numbers.cpu(), label.cpu(), best.cpu()

    @property
    def title(self) -> str:
        """The model's name."""
        return self.hparams.name

    def evaluated(self) -> int:
        """Pictures of the last evaluation; every process takes part."""
        return int(self.figures.confusion.compute().sum())

    def draw_result(self, rows: list[dict[str, Any]], classes: list[str], title: str, path: Path) -> None:
        """Learning curve and confusion matrix, after :meth:`evaluated`."""
        draw(rows, self.figures.confusion.compute().cpu().numpy(), classes, title, path)

    def record(self, folder: Path, stage: str) -> None:
        """Tables of classes and confusions, and a picture of answers and of the surest mistakes."""
        figures = self.figures
        confusion = figures.confusion.compute()
        samples, mistakes = figures.samples.compute().tolist(), figures.mistakes.compute().tolist()
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not self.trainer.is_global_zero:
            return
        write_rows(folder / f"{stage}_classes.csv", class_rows(confusion, data.classes))
        write_matrix(folder / f"{stage}_confusion.csv", confusion, data.classes)
        draw_answers(data.sets[stage], data.classes, samples, mistakes, folder / f"{stage}_pictures.png")

    def published_fits(self, data: Any) -> None:
        """Published weights know their own classes: refuse to measure a new, untrained head."""
        theirs = self.model.pretrained_cfg.get("num_classes")
        if theirs != data.num_classes:
            raise UserError(
                f"{self.hparams.name}'s published weights know {theirs} classes and {data.hparams.root} has "
                f"{data.num_classes}: train first, or give --ckpt_path."
            )

    @staticmethod
    def predictions(folder: str) -> Callback:
        """``predictions.csv``."""
        return Predictions(folder)


def _start_from(weights: str, model: nn.Module) -> None:
    """Load weights, of a run with the model's token reduction or of one without, from which its own teacher then starts."""
    from vitzoo.tokens import is_reduced, without_reduction

    if is_reduced(model):
        try:
            with without_reduction(model):
                load_weights(model, weights)
        except UserError:  # learned parts of the reduction are in the file too
            load_weights(model, weights)
    else:
        load_weights(model, weights)


def _create(name: str, pretrained: bool, num_classes: int, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return vitzoo.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        given = f" with {kwargs}" if kwargs else ""
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"model.name {name!r}{given}: {text}") from error
