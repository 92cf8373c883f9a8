"""The data module: embedded digits or a directory of pictures, as training, evaluation and prediction loaders."""

from __future__ import annotations

import os
import warnings
from typing import Any

from timm.data import resolve_data_config

from .base import StepData, workers
from .errors import UserError, among, within
from .folders import Split, find_splits
from .images import DigitImages, FolderImages, Images, list_images
from .sources import Source, SourceImages, find_sources, read_class_map
from .transforms import eval_transform, train_transform

__all__ = ["ImageData"]


class ImageData(StepData):
    """Pictures with a class each, for Lightning.

    Args:
        root: "digits" (1,797 handwritten digits that need no download; a folder of that name is ``./digits``), or a
            directory with ``train/`` and ``val/`` of class folders, or one of class folders alone.
        dataset: What ``root`` holds: None: folders; "tar" or "wds": shards ``train*.tar`` and ``val*.tar``; "torch/NAME":
            torchvision's set; "hfds/NAME": Hugging Face's.
        download: Let the library of ``dataset`` fetch it.
        class_map: File with the names of the classes, one a line, in the order of their labels.
        batch_size: Pictures in a step over all devices together; an optimiser's update sees this times
            ``trainer.accumulate_grad_batches``.
        num_workers: Processes that load; None: none for the digits, else a process per core, 8 at most.
        seed: Of the order of the pictures and of every augmentation; the command line sets it from ``seed_everything``.
        img_size: Pixels; None: the model's own input size.
        sizes: Edges to train at, a batch has one of them; none: ``img_size``. Evaluation is at ``img_size``.
        progressive: Take ``sizes`` in turn, each for its share of the epochs, instead of drawing one for each batch.
        repeats: Times that a picture comes in an epoch, each augmented anew (repeated augmentation).
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
        train_crop: "rrc" (random resized crop), "rkrc" (resized keeping the ratio, then cropped at random, as DeiT III does) or
            "rkrr" (that, resized at random); None: the first.
        re_prob: Probability of erasing a random rectangle.
        re_mode: Its filling: "const", "rand" (a colour) or "pixel".
        re_count: How many.

    Raises:
        UserError: The directory is not what it should be; one sentence, see :func:`find_splits`.
    """

    def __init__(
        self,
        root: str = "digits",
        dataset: str | None = None,
        download: bool = False,
        class_map: str | None = None,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        img_size: int | None = None,
        sizes: list[int] = [],  # noqa: B006 (never written; a list is what YAML gives)
        progressive: bool = False,
        repeats: int = 1,
        val_fraction: float = 0.1,
        skip_corrupt: bool = False,
        exif: bool = True,
        predict: str | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        scale: list[float] = [0.08, 1.0],  # noqa: B006
        ratio: list[float] = [0.75, 1.3333],  # noqa: B006
        hflip: float = 0.5,
        vflip: float = 0.0,
        affine: bool = False,
        color_jitter: float | None = 0.4,
        auto_augment: str | None = None,
        train_interpolation: str = "random",
        train_crop: str | None = None,
        re_prob: float = 0.0,
        re_mode: str = "pixel",
        re_count: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.classes, self.splits = list(DigitImages.classes), dict[str, Split]()
        self.sources: dict[str, Source] = {}
        names = None if class_map is None else read_class_map(class_map)
        if dataset is not None:
            self.classes, self.sources = find_sources(dataset, root, download, names)
        elif root != "digits":
            self.classes, self.splits = find_splits(root, val_fraction, names)
        self.num_classes = len(self.classes)
        self.num_workers = workers(num_workers, embedded=not self.splits and not self.sources)
        self._check()
        self.sets: dict[str, Images] = {}

    def _check(self) -> None:
        hp = self.hparams
        self.check_loading()
        for key in ("hflip", "vflip", "re_prob"):
            within(f"data.{key}", hp[key], 0, 1)
        for key, low in (("img_size", 1), ("repeats", 1), ("re_count", 1)):
            within(f"data.{key}", hp[key], low)
        for size in hp.sizes:
            within("data.sizes", size, 1)
        within("data.crop_pct", hp.crop_pct, 0, open_low=True)
        for deviation in hp.std or ():
            within("data.std", deviation, 0, open_low=True)
        for key, count in (("mean", 3), ("std", 3), ("scale", 2), ("ratio", 2)):
            if hp[key] is not None and len(hp[key]) != count:
                raise UserError(f"data.{key} is {hp[key]} and must be {count} numbers.")
        among("data.re_mode", hp.re_mode, ("const", "rand", "pixel"))
        for key in ("interpolation", "train_interpolation"):
            if hp[key] is not None:
                among(f"data.{key}", hp[key], ("bilinear", "bicubic", "lanczos", "nearest", "random"))
        if hp.train_crop is not None:
            among("data.train_crop", hp.train_crop, ("rrc", "rkrc", "rkrr"))
        if hp.auto_augment is not None:
            try:
                train_transform({"input_size": (3, 32, 32), "mean": (0, 0, 0), "std": (1, 1, 1)}, auto_augment=hp.auto_augment)
            except (AssertionError, ValueError, KeyError) as error:
                raise UserError(
                    f"data.auto_augment is {hp.auto_augment!r} and timm knows no such policy ({error}); one it knows is "
                    "'rand-m9-mstd0.5-inc1'."
                ) from error

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets of "fit", "validate", "test" or "predict", with the data config of the trainer's model."""
        hp = self.hparams
        config = self.data_config()
        plain = eval_transform(config)
        if stage in ("fit", None) and "train" not in self.sets:
            keys = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "re_prob", "re_mode", "re_count")
            augmentation = {key: hp[key] for key in keys}
            augmentation |= {"interpolation": hp.train_interpolation, "train_crop_mode": hp.train_crop, "affine": hp.affine}
            self.sets["train"] = self._make("train", train_transform(config, **augmentation))
            for size in hp.sizes:
                sized = {**config, "input_size": (config["input_size"][0], size, size)}
                self.sets["train"].transforms[size] = train_transform(sized, **augmentation)
            self.enough()
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
        settings = {"skip_corrupt": self.hparams.skip_corrupt, "exif": self.hparams.exif}
        if self.sources:
            return SourceImages(self.sources[split], self.classes, transform, **settings)
        if not self.splits:
            return DigitImages(split, transform)
        return FolderImages(self.splits[split], self.classes, transform, **settings)

    def teardown(self, stage: str | None = None) -> None:
        """Say how many files could not be read."""
        for split, images in self.sets.items():
            if isinstance(images, FolderImages) and images.skip_corrupt and (broken := images.broken()):
                outcome = {"train": "replaced by others", "predict": "left without a class"}.get(split, "counted as wrong")
                names = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
                text = f"{len(broken)} of {len(images)} {split} pictures could not be read and were {outcome}: {names}"
                warnings.warn(text, stacklevel=2)
                images.forget()
