"""Which images make up which training batch: a function of (seed, epoch, index), so that a run can start anywhere.

Nothing here has a state that would have to be saved. An order of images belongs to (seed, epoch), the augmentation of
an image to (seed, epoch, index), dropout and mixup to (seed, step): a resumed run needs only the number of batches done.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["StepBatches", "mix", "parts", "reseed"]


def mix(*parts: int | str) -> int:
    """A 63-bit seed from integers and strings; the same on every machine and in every process (unlike ``hash``)."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def reseed(seed: int, *, devices: bool = False) -> None:
    """Seed Python's, NumPy's and torch's global generators (timm's transforms and mixup draw from the first two).

    Args:
        seed: Of all of them.
        devices: Those of GPUs too. ``torch.manual_seed`` always does it and formats a stack trace for each kind of device that
            is not in use, some tenths of a millisecond a picture.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if devices:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


Item = tuple[int, int, int | None]  # index, seed, size


def parts(item: int | tuple[int, int] | Item) -> tuple[int, int | None, int | None]:
    """Index, seed and size that an item of a loader asks for; evaluation asks by index alone."""
    if not isinstance(item, tuple):
        return item, None, None
    return item if len(item) == 3 else (*item, None)


class StepBatches(Sampler[list[Item]]):
    """Batch sampler of ``[(image index, seed, size), ...]``, shuffled for each epoch, the incomplete last batch left out.

    Args:
        images: Number of images in the training set.
        batch_size: Images in a step over all processes; each of the ``world`` processes gets every ``world``-th.
        seed: Of the run.
        rank: This process.
        world: Number of processes.
        position: ``(epoch, batch)`` to start from; the batches before it are left out once, in that epoch only.
        repeats: Copies of each image in an epoch, each augmented anew (repeated augmentation, Hoffer et al. 2020); the epoch
            stays as long, with as many times fewer images. Copies lie side by side, so processes share them out.
        sizes: Edges that batches are cut to, one each; none: the loader's own.
        epochs: Of the run: ``sizes`` are taken in turn, each for its share of the epochs; None: drawn for each batch.

    ``len()`` is that of a whole epoch, also in the epoch that starts in the middle: Lightning counts on.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        position: tuple[int, int] = (0, 0),
        repeats: int = 1,
        sizes: Sequence[int] = (),
        epochs: int | None = None,
    ) -> None:
        self.repeats, self.sizes, self.epochs = repeats, tuple(sizes), epochs
        self.images, self.batch_size, self.seed, self.rank, self.world = images, batch_size, seed, rank, world
        self.epoch, self.start = position
        self.sampler = self  # Lightning calls set_epoch on ``batch_sampler.sampler``

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next ``iter()`` serves, counted from 0."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[Item]]:
        return self._batches(self.epoch, self.start)

    def _batches(self, epoch: int, start: int) -> Iterator[list[Item]]:
        generator = torch.Generator().manual_seed(mix(self.seed, "order", epoch))
        order = torch.randperm(self.images, generator=generator)
        order = order.repeat_interleave(self.repeats)[: self.images]
        for batch in range(start, len(self)):
            places = range(batch * self.batch_size, (batch + 1) * self.batch_size)[self.rank :: self.world]
            size = self._size(epoch, batch)
            yield [(index, self._image_seed(epoch, index, place), size) for place in places for index in (int(order[place]),)]

    def _image_seed(self, epoch: int, index: int, place: int) -> int:
        copy = place % self.repeats
        return mix(self.seed, "image", epoch, index, copy) if copy else mix(self.seed, "image", epoch, index)

    def _size(self, epoch: int, batch: int) -> int | None:
        if not self.sizes:
            return None
        if self.epochs is not None:
            return self.sizes[min(len(self.sizes) - 1, epoch * len(self.sizes) // self.epochs)]
        return self.sizes[mix(self.seed, "size", epoch, batch) % len(self.sizes)]
