"""Data sets of pictures: the embedded digits and folders with a class per subfolder; reading a picture right.

timm's own folder data set answers an unreadable file with the *next* image and its label, which counts a neighbour
twice; ours names the file and the class, or does what ``skip_corrupt`` documents.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from .batches import Item, parts, reseed
from .errors import UserError

__all__ = ["EXTENSIONS", "DigitImages", "FolderImages", "Images", "class_folders", "list_images", "read_image"]

EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")


def read_image(path: str | Path | BinaryIO, *, exif: bool = True, name: str = "") -> Image.Image:
    """Read a picture of any kind as 8-bit RGB.

    16-bit grey is divided by 256 (Pillow alone clips it to white), of an animation the first frame is taken, an alpha
    channel is dropped as torchvision and timm do.

    Args:
        path: The file, open or not.
        exif: Turn the picture as its EXIF orientation says. Published ImageNet figures are measured without.
        name: What a message calls it; empty: its path.

    Returns:
        A picture of mode "RGB".

    Raises:
        UserError: The file is not a whole picture, or larger than Pillow's limit of 179 million pixels; names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", "Palette images with Transparency")
            with Image.open(path) as image:
                image.load()
                if exif:
                    image = ImageOps.exif_transpose(image)
                if image.mode == "I" or image.mode.startswith("I;16"):
                    levels = np.asarray(image).astype(np.int64)
                    image = Image.fromarray(np.clip(levels // 256, 0, 255).astype(np.uint8))
                return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, bomb errors, ...
        raise UserError(f"{name or path} cannot be read as a picture ({type(error).__name__}: {error})") from error


def list_images(folder: str | Path) -> list[str]:
    """Every picture below a folder, at any depth, in natural order; files and folders beginning with a dot are not."""
    found, _ = find_images_and_targets(str(folder), types=EXTENSIONS, class_to_idx=_Anything())
    return [path for path, _ in found if not any(part.startswith(".") for part in Path(path).relative_to(folder).parts)]


class _Anything(dict):
    """A class map in which every folder name has index 0, for a listing that asks only for files."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


def class_folders(root: str | Path) -> list[str]:
    """Names of the class folders directly below ``root``, in timm's (natural) order: their place is their label."""
    names = [entry.name for entry in Path(root).iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=natural_key)


class Images(Dataset):
    """Pictures with labels; an item is ``(transformed picture, label)``.

    An item of the training loader is asked for as ``(index, seed, size)`` and its augmentation drawn from that seed; an item
    of an evaluation loader as ``index``.

    Args:
        labels: Label of each picture.
        transform: From a PIL picture to what the batch holds; usually a ``Float[Tensor, "3 h w"]``.
    """

    def __init__(self, labels: list[int], transform: Callable[[Image.Image], Any]) -> None:
        self.labels, self.transform = labels, transform
        self.transforms: dict[int, Callable[[Image.Image], Any]] = {}  # by size, where batches have several

    def picture(self, index: int) -> Image.Image:
        """The picture as RGB, before the transform."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What a message calls a picture."""
        return f"training picture {index}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int | Item) -> tuple[Any, int]:
        index, seed, size = parts(item)
        if seed is not None:
            reseed(seed)
        transform = self.transform if size is None else self.transforms[size]
        return transform(self.picture(index)), self.labels[index]


@lru_cache(maxsize=1)
def _digits() -> tuple[tuple[Image.Image, ...], tuple[int, ...]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    small = (Image.fromarray(np.uint8(np.round(grey * (255 / 16)))) for grey in data.images)
    large = tuple(image.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for image in small)
    return large, tuple(int(label) for label in data.target)


class DigitImages(Images):
    """scikit-learn's handwritten digits: 1,797 scans of 8x8 pixels, bicubic to 32x32; 1,437 to learn, 360 held out.

    The split is one fixed permutation, the same for every seed of a run, so that figures can be compared.

    Args:
        split: "train" or "val".
        transform: As for :class:`Images`.
    """

    classes = tuple("0123456789")
    held_out = 360

    def __init__(self, split: str, transform: Callable[[Image.Image], Any]) -> None:
        pictures, labels = _digits()
        order = np.random.RandomState(0).permutation(len(labels))
        chosen = order[self.held_out :] if split == "train" else order[: self.held_out]
        super().__init__([labels[i] for i in chosen], transform)
        self.pictures = [pictures[i] for i in chosen]

    def picture(self, index: int) -> Image.Image:
        """The digit as a 32x32 RGB picture."""
        return self.pictures[index]


class FolderImages(Images):
    """Picture files with labels.

    A file that cannot be read is an error that names file and class. With ``skip_corrupt`` it is counted instead:

    - in training another picture, drawn by the item's seed, stands in for it with its own label;
    - in evaluation it counts as wrong: the item is a black picture with label ``-1 - label``
      (:class:`vitzoo.tasks.Classification` knows), so that no figure improves because files are broken.

    Args:
        samples: ``(path, label)`` of each picture.
        classes: Name of each label; none where the labels are no classes (prediction numbers its pictures).
        transform: As for :class:`Images`.
        skip_corrupt: See above.
        exif: As for :func:`read_image`.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        classes: list[str],
        transform: Callable[[Image.Image], Any],
        *,
        skip_corrupt: bool = False,
        exif: bool = True,
    ) -> None:
        super().__init__([label for _, label in samples], transform)
        self.paths = [path for path, _ in samples]
        self.classes, self.skip_corrupt, self.exif = classes, skip_corrupt, exif
        self._broken = torch.zeros(len(samples), dtype=torch.bool).share_memory_()  # written by the loader's workers

    def picture(self, index: int) -> Image.Image:
        """The file as RGB; raises :class:`UserError` naming file, class and the way out."""
        try:
            return self.read(index)
        except UserError as error:
            self._broken[index] = True
            of_class = f", class {self.classes[self.labels[index]]!r}" if self.classes else ""
            way_out = "Remove or mend the file, or pass --data.skip_corrupt true."
            raise UserError(f"{error}{of_class}. {way_out}") from error

    def name(self, index: int) -> str:
        """Its path."""
        return self.paths[index]

    def __getitem__(self, item: int | Item) -> tuple[Any, int]:
        index, seed, size = parts(item)
        try:
            return super().__getitem__(item)
        except UserError:
            if not self.skip_corrupt:
                raise
        if seed is None:
            return self.transform(Image.new("RGB", (256, 256))), -1 - self.labels[index]
        draw = random.Random(seed)  # noqa: S311
        for _ in range(100):
            try:
                return super().__getitem__((draw.randrange(len(self)), seed, size))
            except UserError:
                continue
        raise UserError(f"of 101 pictures drawn from the training set not one could be read; the last {self.paths[index]}.")

    def read(self, index: int) -> Image.Image:
        """The file as RGB."""
        return read_image(self.paths[index], exif=self.exif)

    def forget(self) -> None:
        """Count from zero."""
        self._broken.zero_()

    def broken(self) -> list[str]:
        """Paths met so far that could not be read, in this process or in the loader's workers."""
        return [self.paths[i] for i in self._broken.nonzero().flatten().tolist()]
