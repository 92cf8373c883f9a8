"""Semantic segmentation: smp's decoders over any backbone; mIoU and pixel accuracy over the data set."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from vitzoo.data.errors import UserError
from vitzoo.heads import Maps, segmenter
from vitzoo.tasks.dense import SHOWN, DenseTask
from vitzoo.tasks.draw import draw_classes
from vitzoo.tasks.figures import write_matrix, write_rows
from vitzoo.tasks.losses import dice_loss
from vitzoo.tasks.predictions import ClassMaps
from vitzoo.tasks.report import draw_pairs

__all__ = ["IGNORE", "Segmentation", "scores", "slide"]

IGNORE = 255


def scores(confusion: Tensor) -> dict[str, Tensor]:
    """Figures of a confusion matrix ``[C, C]`` whose rows are the true classes.

    ``miou``: mean over the classes that occur (as truth or prediction) of ``TP / (TP + FP + FN)``, counted over the whole
    data set as ADE20K's and Cityscapes' evaluations do; ``pixel_accuracy``; ``class_accuracy``: mean recall of the classes
    that occur as truth. All float64; 0 where nothing was counted.
    """
    counts = confusion.double()
    hit, true, said = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = true + said - hit
    occurs, truly = union > 0, true > 0
    zero = counts.new_zeros(())
    return {
        "miou": (hit[occurs] / union[occurs]).mean() if occurs.any() else zero,
        "pixel_accuracy": hit.sum() / counts.sum() if truly.any() else zero,
        "class_accuracy": (hit[truly] / true[truly]).mean() if truly.any() else zero,
    }


def slide(model: Any, image: Tensor, crop: int, stride: int) -> Tensor:
    """Logits of ``image`` ``[B, 3, H, W]``, the mean over square windows that overlap; the last ones end at the border.

    Args:
        model: of ``[B, 3, h, w]`` to ``[B, C, h, w]``.
        image: any size; one smaller than a window is a window.
        crop: pixels on a side of a window.
        stride: pixels between windows.

    Returns:
        ``[B, C, H, W]``.
    """
    height, width = image.shape[-2:]
    rows, cols = (sorted({min(i, max(0, n - crop)) for i in range(0, max(1, n), stride)}) for n in (height, width))
    total: Tensor | None = None
    seen = image.new_zeros(1, 1, height, width)
    for top in rows:
        for left in cols:
            part = (..., slice(top, top + crop), slice(left, left + crop))
            logits = model(image[part]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[part] += logits
            seen[part] += 1
    assert total is not None
    return total / seen


class Segmentation(DenseTask):
    """Train and evaluate a segmenter.

    Args:
        backbone: Model name, the zoo's or timm's.
        num_classes: Of the data; the command line takes it from there.
        kind: "upernet", "fpn", "segformer", "deeplabv3+", "dpt" or "unet".
        pretrained: Start from the backbone's published weights.
        kwargs: Further arguments of the backbone.
        drop_path: Stochastic depth of the backbone; None: its default.
        channels: Of the decoder; None: its default.
        aux: Weight of an auxiliary head on the map at stride 16; 0: none.
        dropout: Of the decoders that have one; None: their default.
        frozen: Do not train the backbone's stem and this many stages; None: train all.
        checkpoint_stages: Stages that are recomputed in the backward pass: less memory, more time; [-1] stands for the last.
        decoder_kwargs: Further arguments of smp's decoder.
        class_weights: Of the cross-entropy; None: all 1.
        dice: Weight of a dice loss beside it.
        inference: "whole", or "slide" over windows of ``window`` pixels.
        window: Pixels on a side.
        window_stride: Pixels between windows.
        flip_test: Evaluate on the mirrored image too and average.
        optimizer: timm's name.
        lr: Peak learning rate, for ``lr_batch`` pictures an update where that is given.
        lr_batch: Scale ``lr``, ``warmup_lr`` and ``min_lr`` by (pictures an update / ``lr_batch``); None: do not.
        weight_decay: Not on norms, biases and what the backbone's ``no_weight_decay`` names.
        layer_decay: Factor of the rate from each layer of the backbone to the one below; None: one rate.
        optimizer_kwargs: Such as ``betas``, ``eps``, ``momentum``.
        schedule: timm's name.
        warmup_epochs: Linear warm-up, counted in updates.
        warmup_lr: Where it starts.
        warmup_prefix: Start the decay's curve after the warm-up instead of cutting it.
        min_lr: Where the decay ends.
        cooldown_epochs: Epochs at ``min_lr`` at the end.
        decay_epochs: Between the steps of schedule "step".
        decay_rate: Of schedules "step" and "multistep", and the power of "poly".
        milestones: Epochs at which schedule "multistep" decays.
        ema: Decay of the averaged weights; None: none.

    Raises:
        UserError: An unknown decoder or backbone (the nearest names are given), an argument that it does not take.
    """

    FIGURES = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "class_accuracy": "class accuracy", "loss": "loss"}
    CURVES = ("loss", "miou", "pixel_accuracy", "class_accuracy")
    IDENTITY = {"backbone": "the backbone", "kind": "the decoder", "num_classes": "a head for this number of classes:"}

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        kind: str = "upernet",
        pretrained: bool = False,
        kwargs: dict[str, Any] = {},  # noqa: B006 (never written; a dict is what YAML gives)
        drop_path: float | None = None,
        channels: int | None = None,
        aux: float = 0.0,
        dropout: float | None = None,
        frozen: int | None = None,
        checkpoint_stages: list[int] = [],  # noqa: B006
        decoder_kwargs: dict[str, Any] = {},  # noqa: B006
        class_weights: list[float] | None = None,
        dice: float = 0.0,
        inference: str = "whole",
        window: int = 512,
        window_stride: int = 341,
        flip_test: bool = False,
        optimizer: str = "adamw",
        lr: float = 6e-5,
        lr_batch: int | None = None,
        weight_decay: float = 0.01,
        layer_decay: float | None = None,
        optimizer_kwargs: dict[str, Any] = {},  # noqa: B006
        schedule: str = "poly",
        warmup_epochs: float = 1.0,
        warmup_lr: float = 1e-6,
        warmup_prefix: bool = False,
        min_lr: float = 0.0,
        cooldown_epochs: float = 0,
        decay_epochs: float = 30,
        decay_rate: float = 1.0,
        milestones: list[float] = [],  # noqa: B006
        ema: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.check_recipe()
        try:
            self.model = segmenter(
                kind,
                backbone,
                num_classes,
                pretrained=pretrained,
                channels=channels,
                aux=aux > 0,
                dropout=dropout,
                checkpoint_stages=checkpoint_stages,
                frozen=frozen,
                backbone_kwargs=self.backbone_args(),
                **decoder_kwargs,
            )
        except (TypeError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise UserError(f"model.kind {kind!r} on {backbone!r}: {error}") from error
        if inference not in ("whole", "slide"):
            raise UserError(f"model.inference is {inference!r} and must be 'whole' or 'slide'.")
        if class_weights is not None and len(class_weights) != num_classes:
            raise UserError(f"model.class_weights has {len(class_weights)} numbers, and the data has {num_classes} classes.")
        weight = None if class_weights is None else torch.tensor(class_weights)
        self.cross_entropy = nn.CrossEntropyLoss(weight, ignore_index=IGNORE)
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.eval_loss = MeanMetric(nan_strategy="ignore")
        self.counted(self.confusion, self.eval_loss)

    @property
    def maps(self) -> Maps:
        """Below the decoder."""
        return self.model.maps

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy over the pixels with a class, and dice; 0 (with a gradient) where no pixel has one."""
        logits = logits.float()
        if not (labels != IGNORE).any():
            return logits.sum() * 0
        total = self.cross_entropy(logits, labels)
        return total + self.hparams.dice * dice_loss(logits, labels, IGNORE) if self.hparams.dice > 0 else total

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of images ``[B, 3, H, W]`` and classes ``[B, H, W]``."""
        images, labels = batch
        logits, auxiliary = self.model.with_aux(images)
        loss = self.loss(logits, labels)
        if auxiliary is not None:
            loss = loss + self.hparams.aux * self.loss(auxiliary, labels)
        return self.finished(loss, batch_idx)

    def segment(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits ``[classes, *size]`` of one image ``[3, H, W]``, whole or in windows, mirrored too where asked."""
        hp = self.hparams

        def infer(x: Tensor) -> Tensor:
            if hp.inference == "slide":
                return slide(self.model, x, hp.window, hp.window_stride)
            return self.model(x).float()

        logits = infer(image[None])
        if hp.flip_test:
            mirrored = infer(image[None].flip(-1)).flip(-1)
            logits = ((logits.softmax(1) + mirrored.softmax(1)) / 2).clamp_min(1e-12).log()
        if logits.shape[-2:] != torch.Size(size):
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits[0]

    def count_batch(self, batch: tuple[list[Tensor], list[Tensor]]) -> None:
        """Pixels of a batch, by true and predicted class."""
        for image, labels in zip(*batch, strict=True):
            logits = self.segment(image, (labels.shape[0], labels.shape[1]))
            said, known = logits.argmax(0), labels != IGNORE
            self.count.update(1)
            if known.any():
                self.confusion.update(said[known], labels[known])
                self.eval_loss.update(F.cross_entropy(logits[None], labels[None], ignore_index=IGNORE))
                sure = logits.softmax(0).amax(0) * (said != labels)
                self.surest.offer(float(sure[known].mean()), partial(self._pair, image, labels, said))
            if len(self.shown) < SHOWN:
                self.shown.append(self._pair(image, labels, said))

    def _pair(self, image: Tensor, labels: Tensor, said: Tensor) -> tuple[Image.Image, Image.Image]:
        names = self.class_names
        small = F.interpolate(image[None].float(), size=labels.shape, mode="bilinear", align_corners=False)[0].cpu()
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.model.mean, self.model.std))
        pixels = (255 * (small * std + mean)).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        names = names if len(names) <= 30 else []
        return draw_classes(pixels, labels.cpu(), names), draw_classes(pixels, said.cpu(), names)

    def computed(self) -> dict[str, Tensor]:
        """See :func:`scores`, and the mean loss."""
        return {**scores(self.confusion.compute()), "loss": self.eval_loss.compute()}

    def predict_step(self, batch: tuple[list[Tensor], list[Tensor]], batch_idx: int) -> list[Tensor]:
        """Class of each pixel, ``[H, W]`` at the picture's own size, for each image."""
        return [self.segment(i, (l.shape[0], l.shape[1])).argmax(0).cpu() for i, l in zip(*batch, strict=True)]

    def record(self, folder: Path, stage: str) -> None:
        """IoU and recall of each class, confusions in pixels, and a picture of maps and of the surest mistakes."""
        data, confusion = getattr(self.trainer, "datamodule", None), self.confusion.compute()
        if data is None or not self.trainer.is_global_zero:
            return
        counts = confusion.cpu().double()
        hit, true, union = counts.diag(), counts.sum(1), counts.sum(1) + counts.sum(0) - counts.diag()
        rows = [
            {
                "class": name,
                "pixels": int(n),
                "iou": round(float(h / u), 6) if u else "",
                "recall": round(float(h / n), 6) if n else "",
            }
            for name, h, n, u in zip(data.classes, hit, true, union, strict=True)
        ]
        write_rows(folder / f"{stage}_classes.csv", rows)
        write_matrix(folder / f"{stage}_confusion.csv", confusion, data.classes)
        draw_pairs(self.shown, self.surest, folder / f"{stage}_pictures.png")

    def published_fits(self, data: Any) -> None:
        """A backbone's published weights segment nothing yet."""
        raise UserError("Published weights are of the backbone alone and segment nothing: train first, or give --ckpt_path.")

    @staticmethod
    def predictions(folder: str) -> Callback:
        """A PNG of class numbers and one of colours for each picture, in ``predictions/``."""
        return ClassMaps(folder)
