"""The data module: embedded digits or a directory of pictures, as training, evaluation and prediction loaders."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from timm.data import resolve_data_config
from torch.utils.data import DataLoader

from .batches import StepBatches
from .errors import UserError
from .folders import Split, find_splits
from .images import DigitImages, FolderImages, Images, list_images
from .transforms import eval_transform, train_transform

__all__ = ["ImageData"]


class ImageData(LightningDataModule):
    """Pictures with a class each, for Lightning.

    Args:
        root: "digits" (1,797 handwritten digits that need no download; a folder of that name is ``./digits``), or a
            directory with ``train/`` and ``val/`` of class folders, or one of class folders alone.
        batch_size: Pictures in a step over all devices together; an optimiser's update sees this times
            ``trainer.accumulate_grad_batches``.
        num_workers: Processes that load; None: none for the digits, else a process per core, 8 at most.
        seed: Of the order of the pictures and of every augmentation; the command line sets it from ``seed_everything``.
        img_size: Pixels; None: the model's own input size.
        val_fraction: Part of each class held out where there is no ``val/``.
        skip_corrupt: Count unreadable files and go on (training draws another picture in their place, evaluation counts
            them as wrong, prediction leaves the class empty); else the first one ends the run, named.
        exif: Turn pictures as their EXIF orientation says (published ImageNet figures: false).
        predict: Folder of pictures, at any depth, for the ``predict`` command.
        interpolation: For evaluation; None: the model's.
        crop_pct: Part of the resized picture's edge that evaluation crops; None: the model's.
        mean: Per channel, of values in 0..1; None: the model's.
        std: As ``mean``.
        scale: Range of the area that a random training crop covers.
        ratio: Range of its aspect ratio.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        affine: Turn, shift, scale and shear before the crop, as suits handwriting.
        color_jitter: Strength; not used together with ``auto_augment`` (timm's rule).
        auto_augment: timm's name of a policy, such as ``rand-m9-mstd0.5-inc1``.
        train_interpolation: "random", "bilinear" or "bicubic".
        re_prob: Probability of erasing a random rectangle.
        re_mode: Its filling: "const", "rand" (a colour) or "pixel".
        re_count: How many.

    Raises:
        UserError: The directory is not what it should be; one sentence, see :func:`find_splits`.
    """

    def __init__(
        self,
        root: str = "digits",
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        img_size: int | None = None,
        val_fraction: float = 0.1,
        skip_corrupt: bool = False,
        exif: bool = True,
        predict: str | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        scale: list[float] = [0.08, 1.0],  # noqa: B006 (never written; a list is what YAML gives)
        ratio: list[float] = [0.75, 1.3333],  # noqa: B006
        hflip: float = 0.5,
        vflip: float = 0.0,
        affine: bool = False,
        color_jitter: float | None = 0.4,
        auto_augment: str | None = None,
        train_interpolation: str = "random",
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        re_count: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.classes, self.splits = list(DigitImages.classes), dict[str, Split]()
        if root != "digits":
            self.classes, self.splits = find_splits(root, val_fraction)
        self.num_classes = len(self.classes)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.num_workers = num_workers if num_workers is not None else (min(8, cores) if self.splits else 0)
        self.sets: dict[str, Images] = {}
        self.position = (0, 0)
        self._saved_batches: int | None = None

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of "fit", "validate", "test" or "predict", with the data config of the trainer's model."""
        hp = self.hparams
        config = self.data_config()
        plain = eval_transform(config)
        if stage in ("fit", None) and "train" not in self.sets:
            keys = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "re_prob", "re_mode", "re_count")
            augmentation = {key: hp[key] for key in keys}
            augment = train_transform(config, affine=hp.affine, interpolation=hp.train_interpolation, **augmentation)
            self.sets["train"] = self._make("train", augment)
            if len(self.sets["train"]) < hp.batch_size:
                raise UserError(
                    f"data.batch_size is {hp.batch_size}, and there are only {len(self.sets['train'])} training pictures. "
                    f"Give --data.batch_size {max(1, len(self.sets['train']) // 4)} or less."
                )
        if stage != "predict":
            for split in ("test",) if stage == "test" else ("val",):
                self.sets.setdefault(split, self._make(split, plain))
        elif hp.predict is not None:
            paths = list_images(hp.predict) if os.path.isdir(hp.predict) else []
            if not paths:
                raise UserError(f"data.predict is {hp.predict!r}, and no picture was found there. Give a folder of pictures.")
            numbered = [(path, number) for number, path in enumerate(paths)]
            self.sets["predict"] = FolderImages(numbered, [], plain, skip_corrupt=hp.skip_corrupt, exif=hp.exif)
        else:
            raise UserError("predict needs to know which pictures: give --data.predict FOLDER.")

    def data_config(self) -> dict[str, Any]:
        """timm's data config: what was given here, else the model's own (input_size, mean, std, crop_pct, ...)."""
        hp = self.hparams
        module = self.trainer.lightning_module if self.trainer is not None else None
        given = {key: hp[key] for key in ("interpolation", "crop_pct", "mean", "std") if hp[key] is not None}
        if hp.img_size is not None:
            given["input_size"] = (3, hp.img_size, hp.img_size)
        model = getattr(module, "model", None)
        return resolve_data_config(given if given or model is not None else {"input_size": (3, 224, 224)}, model=model)

    def _make(self, split: str, transform: Any) -> Images:
        if not self.splits:
            return DigitImages(split, transform)
        samples: Split = self.splits[split]
        return FolderImages(samples, self.classes, transform, skip_corrupt=self.hparams.skip_corrupt, exif=self.hparams.exif)

    @property
    def world(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    @property
    def train_batches(self) -> int:
        """Steps in a whole epoch; known without building a loader, so that a schedule can be computed from it."""
        return len(self.sets["train"]) // self.hparams.batch_size

    def train_dataloader(self) -> DataLoader:
        """Batches from the position of the checkpoint that was loaded, else from the start."""
        rank, world = self.world
        hp = self.hparams
        if hp.batch_size % world:
            raise UserError(f"data.batch_size {hp.batch_size} counts all devices, and {world} devices do not divide it.")
        if self._saved_batches is not None and self._saved_batches != self.epoch_batches():
            raise UserError(
                f"The checkpoint was written in epochs of {self._saved_batches} steps, and now there are "
                f"{self.epoch_batches()}: go on with the same data and data.batch_size."
            )
        batches = StepBatches(len(self.sets["train"]), hp.batch_size, hp.seed, rank=rank, world=world, position=self.position)
        return DataLoader(self.sets["train"], batch_sampler=batches, **self._loading())

    def epoch_batches(self) -> int:
        limit = self.trainer.limit_train_batches if self.trainer is not None else 1.0
        return int(self.train_batches * limit) if isinstance(limit, float) else min(limit, self.train_batches)

    def _evaluation(self, split: str) -> DataLoader:
        rank, world = self.world
        every = range(rank, len(self.sets[split]), world)  # each picture once, also where ``world`` does not divide
        size = max(1, self.hparams.batch_size // world)
        return DataLoader(self.sets[split], batch_size=size, sampler=every, **self._loading())

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
        workers = self.num_workers
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
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

    def teardown(self, stage: str | None = None) -> None:
        """Say how many files could not be read."""
        for split, images in self.sets.items():
            if isinstance(images, FolderImages) and images.skip_corrupt and (broken := images.broken()):
                outcome = {"train": "replaced by others", "predict": "left without a class"}.get(split, "counted as wrong")
                names = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
                text = f"{len(broken)} of {len(images)} {split} pictures could not be read and were {outcome}: {names}"
                warnings.warn(text, stacklevel=2)
                images.forget()
