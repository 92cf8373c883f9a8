"""Detection and instance segmentation: torchvision's detectors over any backbone, COCO's figures through torchmetrics."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import batched_nms, box_iou

from vitzoo.data.errors import UserError
from vitzoo.heads import Maps, detector
from vitzoo.tasks.dense import SHOWN, DenseTask
from vitzoo.tasks.draw import draw_boxes
from vitzoo.tasks.figures import write_rows
from vitzoo.tasks.predictions import FoundObjects
from vitzoo.tasks.report import draw_pairs

__all__ = ["Detection", "mean_average_precision"]


class PicturesOfAll(MeanAveragePrecision):
    """torchmetrics' figures over several processes that have seen different numbers of pictures.

    What is kept of each picture is put into the order in which the pictures were served, one to each process in turn;
    torchmetrics gathers picture by picture and waits for those that a process does not have.
    """

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        del dist_sync_fn
        group = process_group or self.process_group
        mine = {name: _moved(getattr(self, name), "cpu") for name in self._reductions}
        every: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(every, mine, group=group)
        for name in self._reductions:
            most = max(len(one[name]) for one in every)
            served = [one[name][i] for i in range(most) for one in every if i < len(one[name])]
            setattr(self, name, _moved(served, self.device))


def mean_average_precision(masks: bool, backend: Any = "pycocotools") -> MeanAveragePrecision:
    """COCO's average precision for boxes, and for masks where asked; sizes, crowds and areas as COCO counts them."""
    try:
        return PicturesOfAll(iou_type=("bbox", "segm") if masks else "bbox", backend=backend)
    except ModuleNotFoundError as error:
        raise UserError(f"COCO's figures need {backend}: pip install 'vitzoo[dense]' ({error}).") from error


class Detection(DenseTask):
    """Train and evaluate a detector.

    Args:
        backbone: Model name, the zoo's or timm's.
        num_classes: Of the data, the background not counted; the command line takes it from there.
        kind: "maskrcnn", "fasterrcnn", "retinanet" or "fcos".
        pretrained: Start from the backbone's published weights.
        kwargs: Further arguments of the backbone.
        drop_path: Stochastic depth of the backbone; None: its default.
        channels: Of the feature pyramid.
        strides: Of the backbone's maps; None: the detector's usual ones.
        extra: Maps beyond the backbone's; None: the detector's usual number.
        dyhead: Blocks of a dynamic head on the pyramid.
        head_convs: Convolutions of FCOS' towers.
        min_size: Shorter edges that images are resized to; one is drawn for each training image (multi-scale), the last
            one is evaluated at.
        max_size: Longest edge after that.
        frozen: Do not train the backbone's stem and this many stages; None: train all.
        checkpoint_stages: Stages that are recomputed in the backward pass: less memory, more time; [-1] stands for the last.
        detector_kwargs: Further arguments of torchvision's class.
        flip_test: Evaluate on the mirrored image too and merge.
        backend: "pycocotools", or "faster_coco_eval" (the same figures, faster; installed separately).
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
        decay_rate: Of schedules "step" and "multistep".
        milestones: Epochs at which schedule "multistep" decays.
        ema: Decay of the averaged weights; None: none.

    Raises:
        UserError: An unknown detector or backbone (the nearest names are given), an argument that it does not take.
    """

    FIGURES = {"box_ap": "box AP", "box_ap50": "AP50", "box_ap75": "AP75", "mask_ap": "mask AP", "mask_ap50": "mask AP50"}
    CURVES = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50")
    IDENTITY = {"backbone": "the backbone", "kind": "the detector", "num_classes": "heads for this number of classes:"}

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        kind: str = "fasterrcnn",
        pretrained: bool = False,
        kwargs: dict[str, Any] = {},  # noqa: B006 (never written; a dict is what YAML gives)
        drop_path: float | None = None,
        channels: int = 256,
        strides: list[int] | None = None,
        extra: int | None = None,
        dyhead: int = 0,
        head_convs: int = 4,
        min_size: list[int] = [800],  # noqa: B006
        max_size: int = 1333,
        frozen: int | None = None,
        checkpoint_stages: list[int] = [],  # noqa: B006
        detector_kwargs: dict[str, Any] = {},  # noqa: B006
        flip_test: bool = False,
        backend: str = "pycocotools",
        optimizer: str = "adamw",
        lr: float = 1e-4,
        lr_batch: int | None = None,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        optimizer_kwargs: dict[str, Any] = {},  # noqa: B006
        schedule: str = "cosine",
        warmup_epochs: float = 0.1,
        warmup_lr: float = 1e-6,
        warmup_prefix: bool = False,
        min_lr: float = 0.0,
        cooldown_epochs: float = 0,
        decay_epochs: float = 30,
        decay_rate: float = 0.1,
        milestones: list[float] = [],  # noqa: B006
        ema: float | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.check_recipe()
        try:
            self.model: Any = detector(
                kind,
                backbone,
                num_classes,
                pretrained=pretrained,
                strides=strides,
                extra=extra,
                channels=channels,
                dyhead=dyhead,
                head_convs=head_convs,
                min_size=tuple(min_size),
                max_size=max_size,
                checkpoint_stages=checkpoint_stages,
                frozen=frozen,
                backbone_kwargs=self.backbone_args(),
                **detector_kwargs,
            )
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"model.kind {kind!r} on {backbone!r}: {error}") from error
        self.masks = kind.lower().replace("_", "").replace("-", "") == "maskrcnn"
        self.metric = mean_average_precision(self.masks, backend)
        self.counted(self.metric)

    @property
    def maps(self) -> Maps:
        """Below the feature pyramid."""
        maps: Maps = self.model.backbone.maps
        return maps

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Any]]], batch_idx: int) -> Tensor:
        """Sum of the detector's losses on images ``[3, H, W]`` in 0..1 and their targets."""
        images, targets = batch
        known = ("boxes", "labels", "masks")
        found = [{key: _for_loss(key, t[key]) for key in known if key in t} for t in targets]
        losses: dict[str, Tensor] = self.model(images, found)
        loss = torch.stack(list(losses.values())).sum()
        return self.finished(loss, batch_idx)

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What is found in each image, in eval mode: ``boxes``, ``labels``, ``scores``, and bool ``masks`` ``[n, H, W]``."""
        found = [_bool_masks(f) for f in self.model(images)]
        if self.hparams.flip_test:
            mirrored = self.model([image.flip(-1) for image in images])
            found = [
                _merge(one, _mirror(_bool_masks(other), image.shape[-1]))
                for one, other, image in zip(found, mirrored, images, strict=True)
            ]
        return found

    def count_batch(self, batch: tuple[list[Tensor], list[dict[str, Any]]]) -> None:
        """Boxes, and masks, of a batch."""
        images, targets = batch
        found = self.detect(images)
        known = ("boxes", "labels", "iscrowd", "area", *(("masks",) if self.masks else ()))
        self.metric.update(
            [{key: value.float() if key in ("boxes", "scores") else value for key, value in f.items()} for f in found],
            [{key: t[key] for key in known if key in t} for t in targets],
        )
        self.count.update(len(images))
        for image, target, said in zip(images, targets, found, strict=True):
            if len(self.shown) < SHOWN:
                self.shown.append(self._pair(image, target, said))
            self.surest.offer(_false_alarm(target, said), partial(self._pair, image, target, said))

    def _pair(self, image: Tensor, target: dict[str, Any], said: dict[str, Tensor]) -> tuple[Image.Image, Image.Image]:
        names = self.class_names
        pixels = (255 * image).round().byte().permute(1, 2, 0).cpu().numpy()
        truth = draw_boxes(pixels, **_arrays(target, "boxes", "labels", "masks"), classes=names)
        return truth, draw_boxes(pixels, **_arrays(said, "boxes", "labels", "scores", "masks"), classes=names)

    def computed(self) -> dict[str, Tensor]:
        """COCO's average precisions."""
        found = self.metric.compute()
        start = "bbox_" if self.masks else ""
        figures = {
            "box_ap": found[f"{start}map"],
            "box_ap50": found[f"{start}map_50"],
            "box_ap75": found[f"{start}map_75"],
        }
        return figures | ({"mask_ap": found["segm_map"], "mask_ap50": found["segm_map_50"]} if self.masks else {})

    def predict_step(
        self, batch: tuple[list[Tensor], list[dict[str, Any]]], batch_idx: int
    ) -> list[tuple[int, dict[str, Tensor]]]:
        """(picture number, what is found there) for each image."""
        images, targets = batch
        found = self.detect(images)
        return [(t["image_id"], {key: value.cpu() for key, value in f.items()}) for t, f in zip(targets, found, strict=True)]

    def record(self, folder: Path, stage: str) -> None:
        """AP of each class, and a picture of what was found and of the surest false alarms."""
        data = getattr(self.trainer, "datamodule", None)
        self.metric.class_metrics, self.metric._computed = True, None  # costs a second count, so not at every validation
        found = self.metric.compute()
        self.metric.class_metrics, self.metric._computed = False, None
        if data is None or not self.trainer.is_global_zero:
            return
        start = "bbox_" if self.masks else ""
        average = dict(
            zip(found["classes"].reshape(-1).tolist(), found[f"{start}map_per_class"].reshape(-1).tolist(), strict=True)
        )
        values = [average.get(k + 1, -1.0) for k in range(len(data.classes))]  # -1: no object of it
        rows = [{"class": name, "ap": round(ap, 6) if ap >= 0 else ""} for name, ap in zip(data.classes, values, strict=True)]
        write_rows(folder / f"{stage}_classes.csv", rows)
        draw_pairs(self.shown, self.surest, folder / f"{stage}_pictures.png")

    def published_fits(self, data: Any) -> None:
        """A backbone's published weights detect nothing yet."""
        raise UserError("Published weights are of the backbone alone and detect nothing: train first, or give --ckpt_path.")

    @staticmethod
    def predictions(folder: str) -> Callback:
        """``predictions.json`` in COCO's format of results, and a picture each in ``predictions/``."""
        return FoundObjects(folder)


def _moved(kept: list[Any], device: torch.device | str) -> list[Any]:
    """Tensors of pictures on another device; masks are coded, not tensors."""
    return [one.to(device) if isinstance(one, Tensor) else one for one in kept]


def _false_alarm(target: dict[str, Any], said: dict[str, Tensor]) -> float:
    """Highest score of a box that overlaps no object of its class by half."""
    boxes, labels = target["boxes"].to(said["boxes"]), target["labels"].to(said["labels"])
    same = labels[None] == said["labels"][:, None]
    fits = ((box_iou(said["boxes"], boxes) >= 0.5) & same).any(1)
    return float(said["scores"][~fits].max()) if not fits.all() else 0.0


def _for_loss(key: str, value: Tensor) -> Tensor:
    return value.to(torch.uint8) if key == "masks" else value


def _bool_masks(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**found, "masks": found["masks"][:, 0] >= 0.5} if "masks" in found else found


def _mirror(found: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    x1, y1, x2, y2 = found["boxes"].unbind(-1)
    turned = {**found, "boxes": torch.stack((width - x2, y1, width - x1, y2), -1)}
    return {**turned, "masks": found["masks"].flip(-1)} if "masks" in found else turned


def _merge(one: dict[str, Tensor], other: dict[str, Tensor], iou: float = 0.5, most: int = 100) -> dict[str, Tensor]:
    both = {key: torch.cat((one[key], other[key])) for key in one}
    kept = batched_nms(both["boxes"].float(), both["scores"].float(), both["labels"], iou)[:most]
    return {key: value[kept] for key, value in both.items()}


def _arrays(found: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: found[key].float().cpu().numpy() for key in keys if key in found}
