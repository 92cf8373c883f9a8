"""How many tokens go at which depth, and at which moment of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def merge_schedule(depth: int, r: int | Sequence[float], inflection: float = 0.0) -> tuple[int, ...]:
    """Tokens that each of ``depth`` blocks merges away (ToMe).

    Args:
        depth: blocks.
        r: one number for all; or a list, one for each block, with zeros where it is too short; or ToMe's pair
            ``(r, inflection)`` as a tuple of an int and a float.
        inflection: 0: constant; -1: linear from 2r down to 0; 1: from 0 up to 2r. The mean stays r.

    Returns:
        One number for each block.

    Raises:
        ValueError: a negative number, or an inflection beside a list.
    """
    if isinstance(r, tuple) and len(r) == 2 and isinstance(r[1], float):
        inflection = r[1]
        r = int(r[0])
    if not isinstance(r, int):
        if inflection:
            raise ValueError(f"a list of r says what each block merges; inflection={inflection} bends a single r.")
        counts = [int(count) for count in r][:depth]
        counts += [0] * (depth - len(counts))
    else:
        first = int(r * (1.0 - inflection))
        last = 2 * r - first
        step = (last - first) / (depth - 1) if depth > 1 else 0.0
        counts = [int(first + step * i) for i in range(depth)]
    if min(counts, default=0) < 0:
        raise ValueError(f"r counts tokens to merge and cannot be negative, got {r}.")
    return tuple(counts)


def pruning_layers(depth: int) -> tuple[int, ...]:
    """Blocks 3, 6, 9 of 12, and the same places in other depths: where EViT, DynamicViT and TPS prune."""
    return tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3)} - {depth}))


def check_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """The block indices as a tuple; ValueError where one is not a block of the model."""
    for layer in layers:
        if not 0 <= layer < depth:
            raise ValueError(f"block {layer} was named for a reduction, and the model has blocks 0 to {depth - 1}.")
    return tuple(int(layer) for layer in layers)


def check_rate(rate: float, name: str = "keep_rate") -> float:
    """The rate as a float; ValueError unless it lies in (0, 1]."""
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"{name} is a share of the tokens in (0, 1], got {rate}.")
    return float(rate)


@dataclass(frozen=True)
class KeepRate:
    """EViT's keep rate over a training: 1 at first, then down a cosine, then what it stays at.

    Attributes:
        base: final rate.
        start_epoch: the first epoch in which it falls.
        epochs: how many it takes to fall, counted in updates; 0: it is ``base`` from ``start_epoch`` on.
    """

    base: float
    start_epoch: float = 0.0
    epochs: float = 0.0

    def at(self, epoch: float) -> float:
        """The rate after ``epoch`` epochs (updates over updates an epoch; fractions count)."""
        done = epoch - self.start_epoch
        if done < 0:
            return 1.0
        if done >= self.epochs:
            return self.base
        return self.base + (1 - self.base) * 0.5 * (math.cos(math.pi * done / self.epochs) + 1)
