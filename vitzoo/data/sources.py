"""Pictures that do not lie in folders: tar shards (WebDataset's among them), torchvision's and Hugging Face's sets.

All of them are read at random places, so order, augmentation and resuming are those of folders. A shard is indexed once, by
the headers of its members; nothing is unpacked. What can only be streamed (``hfids/``, addresses) cannot be resumed in the
middle of an epoch and is refused.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from timm.data import create_dataset
from timm.utils.misc import natural_key

from .errors import UserError
from .images import EXTENSIONS, FolderImages, read_image

__all__ = ["LibrarySource", "Shards", "Source", "SourceImages", "find_sources", "read_class_map"]


class Source:
    """Pictures with labels.

    Attributes:
        labels: Of each.
        names: What messages and predictions call each.
    """

    labels: list[int]
    names: list[str]

    def read(self, index: int) -> Image.Image | BinaryIO:
        """The picture, decoded or as a file."""
        raise NotImplementedError


class SourceImages(FolderImages):
    """Pictures of a :class:`Source`; what cannot be read is treated as in :class:`FolderImages`.

    Args:
        source: Where they come from.
        classes: Name of each label.
        transform: As for :class:`Images`.
        **settings: ``skip_corrupt`` and ``exif``.
    """

    def __init__(self, source: Source, classes: list[str], transform: Callable[[Image.Image], Any], **settings: bool) -> None:
        super().__init__(list(zip(source.names, source.labels, strict=True)), classes, transform, **settings)
        self.source = source

    def read(self, index: int) -> Image.Image:
        """The picture as RGB."""
        found = self.source.read(index)
        if isinstance(found, Image.Image):
            return found.convert("RGB")
        return read_image(found, exif=self.exif, name=self.paths[index])


class _Member(NamedTuple):
    shard: str
    offset: int
    size: int


class Shards(Source):
    """Tar files. A member's class is the number in the ``.cls`` beside it (WebDataset), else the name of its folder.

    Args:
        paths: The tar files of a split.
        classes: Their names where folders name them; None: those found here, in natural order.

    Raises:
        UserError: A file that is no tar, a picture without a class, a class that ``classes`` does not have.
    """

    def __init__(self, paths: list[str], classes: list[str] | None) -> None:
        found: list[tuple[_Member, str, int | str]] = []
        for path in paths:
            found += self._index(path)
        if not found:
            raise UserError(f"{paths[0]} and the shards beside it hold no picture ({', '.join(EXTENSIONS)}).")
        said = {label for *_, label in found}
        numbered = all(isinstance(label, int) for label in said)
        if classes is None:
            highest = max((label for label in said if isinstance(label, int)), default=-1)
            classes = [str(i) for i in range(highest + 1)] if numbered else sorted(map(str, said), key=natural_key)
        self.classes = classes
        places = {name: i for i, name in enumerate(classes)}
        for label in said:
            if (label not in range(len(classes))) if isinstance(label, int) else (label not in places):
                raise UserError(f"{paths[0]} and the shards beside it have the class {label!r}, which training has not.")
        self.members = [member for member, *_ in found]
        self.names = [name for _, name, _ in found]
        self.labels = [label if isinstance(label, int) else places[label] for *_, label in found]
        self._open: dict[tuple[int, str], BinaryIO] = {}

    @staticmethod
    def _index(path: str) -> list[tuple[_Member, str, int | str]]:
        pictures: list[tuple[str, _Member]] = []
        numbers: dict[str, int] = {}
        try:
            with tarfile.open(path, "r:") as shard:  # not compressed: read at random places
                for member in shard:
                    place = PurePosixPath(member.name)
                    if not member.isfile() or place.name.startswith("."):
                        continue
                    key = str(place.parent / place.name.split(".")[0])
                    if place.name.endswith(".cls"):
                        file = shard.extractfile(member)
                        numbers[key] = int(file.read().decode()) if file is not None else -1
                    elif place.suffix.lower() in EXTENSIONS:
                        pictures.append((member.name, _Member(path, member.offset_data, member.size)))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as a tar of pictures ({type(error).__name__}: {error}).") from error
        found: list[tuple[_Member, str, int | str]] = []
        for name, where in pictures:
            place = PurePosixPath(name)
            key = str(place.parent / place.name.split(".")[0])
            label: int | str = numbers.get(key, place.parent.name)
            if label == "":
                raise UserError(f"{path}: {name} has no class: neither a {place.name.split('.')[0]}.cls nor a folder.")
            found.append((where, f"{path}/{name}", label))
        return found

    def read(self, index: int) -> BinaryIO:
        """The member's bytes; each process has a file of its own."""
        shard, offset, size = self.members[index]
        key = (os.getpid(), shard)
        if key not in self._open:
            self._open[key] = open(shard, "rb")  # noqa: SIM115 (stays open for the next picture)
        self._open[key].seek(offset)
        return io.BytesIO(self._open[key].read(size))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class LibrarySource(Source):
    """A set that timm opens: torchvision's or Hugging Face's.

    Args:
        data: What ``timm.data.create_dataset`` returned.
        name: For messages.
    """

    def __init__(self, data: Any, name: str) -> None:
        self.reader = getattr(data, "reader", None)
        self.data = data
        if self.reader is not None:
            self.labels = [int(label) for label in self.reader.iter_targets()]
            known = {label: key for key, label in self.reader.class_to_idx.items()}
        else:
            stored = next((getattr(data, key) for key in ("targets", "labels", "_labels") if hasattr(data, key)), None)
            self.labels = [int(label) for label in (stored if stored is not None else (data[i][1] for i in range(len(data))))]
            known = dict(enumerate(map(str, getattr(data, "classes", []))))
        self.classes = [str(known.get(i, i)) for i in range(max([*self.labels, *known, 0]) + 1)]
        self.names = [f"{name} {i}" for i in range(len(self.labels))]

    def read(self, index: int) -> Image.Image | BinaryIO:
        """The picture."""
        return self.reader[index][0] if self.reader is not None else self.data[index][0]


def read_class_map(path: str) -> list[str]:
    """Names of the classes, one a line, in the order of their labels.

    Args:
        path: A text file; a number after the name, as timm's class maps have, must be the line's (from 0).

    Returns:
        The names.

    Raises:
        UserError: No such file, a name twice, a number that is not the line's.
    """
    try:
        lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.class_map {path} cannot be read ({error}).") from error
    names = [line[0] for line in lines]
    wrong = next((i for i, line in enumerate(lines) if names.index(line[0]) != i or line[1:] not in ([], [str(i)])), None)
    if wrong is not None:
        raise UserError(
            f"data.class_map {path}: line {wrong + 1}, {' '.join(lines[wrong])!r}, is a name twice or out of order."
        )
    return names


def find_sources(dataset: str, root: str, download: bool, class_map: list[str] | None) -> tuple[list[str], dict[str, Source]]:
    """Open a data set.

    Args:
        dataset: "tar" or "wds" (``root`` holds ``train*.tar`` and ``val*.tar``, or such files in ``train/`` and ``val/``),
            "torch/NAME" of torchvision, "hfds/NAME" of Hugging Face (needs the package datasets).
        root: Folder of the shards, or where a library keeps the set.
        download: Let the library fetch it.
        class_map: Names of the classes in the order of their labels.

    Returns:
        The classes, and the splits "train", "val" and "test" (the held-out one again where there is no test split).

    Raises:
        UserError: It is not there, or can only be streamed.
    """
    kind = dataset.partition("/")[0]
    if kind in ("tar", "wds"):
        paths = {split: _shards(Path(root), names) for split, names in (("train", ("train",)), ("val", ("val", "validation")))}
        for split, found in paths.items():
            if not found:
                raise UserError(f"data.dataset {dataset!r}: {root} has no {split}*.tar and no {split}/*.tar.")
        train = Shards(paths["train"], class_map)
        held = Shards(paths["val"], train.classes)
        test = _shards(Path(root), ("test",))
        return train.classes, {"train": train, "val": held, "test": Shards(test, train.classes) if test else held}
    if kind not in ("torch", "hfds"):
        raise UserError(
            f"data.dataset is {dataset!r} and must be tar, wds, torch/NAME or hfds/NAME; what can only be streamed cannot be "
            "resumed in the middle of an epoch: download its shards."
        )
    splits: dict[str, Any] = {}
    for split, names in (("train", ("train",)), ("val", ("validation", "val", "test"))):
        for name in names:
            try:
                opened = create_dataset(dataset, root, split=name, download=download)
                splits[split] = LibrarySource(opened, f"{dataset} {name}")
                break
            except ImportError as error:
                raise UserError(f"data.dataset {dataset!r} needs a package that is not installed: {error}.") from error
            except Exception as error:  # libraries raise anything for a split that they do not have
                last = " ".join(str(error).split()) or type(error).__name__
        else:
            raise UserError(
                f"data.dataset {dataset!r} could not be opened in {root} ({last}). --data.download true may fetch it."
            )
    classes = class_map or splits["train"].classes
    return classes, {**splits, "test": splits["val"]}


def _shards(root: Path, names: tuple[str, ...]) -> list[str]:
    for name in names:
        found = sorted((*root.glob(f"{name}*.tar"), *(root / name).glob("*.tar")), key=lambda path: natural_key(str(path)))
        if found:
            return [str(path) for path in found]
    return []
