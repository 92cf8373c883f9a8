"""An axis as runs of equal tiles: the integers from which the eager form cuts its views.

A tile is a piece of consecutive query positions with the rectangle of keys that they see. Tiles that look alike (same size,
same keys around them, same cuts) and follow each other are one `Segment`, which strided views can read at once.
Everything here is integers, so caching it leaks no memory and knows no device.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from vitzoo.patterns import Span


class Segment(NamedTuple):
    """`tiles` equal tiles in each of `residues` neighbouring residue classes; positions count inside a class."""

    step: int
    residue: int
    residues: int
    query: int  # first query position of the first tile
    tile: int  # queries in a tile, and the way from one tile to the next
    tiles: int
    key: int  # first key position of the first tile
    extent: int  # keys of a tile
    lo: tuple[int, ...]  # for each query of a tile: first key it sees, counted from the tile's first key
    hi: tuple[int, ...]  # ... and one past the last

    @property
    def masked(self) -> bool:
        """Whether some query of a tile does not see all of the tile's keys."""
        return any(lo > 0 for lo in self.lo) or any(hi < self.extent for hi in self.hi)

    @property
    def offset(self) -> int:
        """Position of a tile's first key minus that of its first query."""
        return self.key - self.query


@lru_cache(maxsize=4096)
def segments(span: Span, n: int) -> tuple[Segment, ...]:
    """The segments of a resolved span on an axis of `n` coordinates; every coordinate is a query of exactly one."""
    short, longer = divmod(n, span.step)  # `longer` classes hold short + 1 positions, the others short
    classes = [(0, longer, short + 1), (longer, span.step - longer, short)]
    found = []
    for residue, residues, length in classes:
        if residues and length:
            found += [Segment(span.step, residue, residues, *run) for run in _runs(span, length)]
    return tuple(found)


def _runs(span: Span, length: int) -> list[tuple]:
    """(query, tile, tiles, key, extent, lo, hi) of one residue class."""
    size = tile_size(span, length)
    cuts = sorted({0, length, *range(span.shift, length, size)})
    runs: list[list] = []
    for begin, end in pairwise(cuts):
        starts = [span.start(m, length) for m in range(begin, end)]
        key, stop = max(0, starts[0]), min(length, starts[-1] + span.size)
        lo = tuple(max(0, start) - key for start in starts)
        hi = tuple(min(length, start + span.size) - key for start in starts)
        if runs:
            query, tile, tiles, first_key, *shape = runs[-1]
            alike = (end - begin, stop - key, lo, hi) == (tile, *shape)
            if alike and (begin, key) == (query + tiles * tile, first_key + tiles * tile):
                runs[-1][2] += 1
                continue
        runs.append([begin, end - begin, 1, key, stop - key, lo, hi])
    return [tuple(run) for run in runs]


def tile_size(span: Span, length: int) -> int:
    """Queries in a tile: a run where runs are shared, about the kernel's size where they slide."""
    if span.partitions:
        return span.size
    if length <= span.size:
        return length
    wanted = max(1, min(max(span.size, 4), 8) // span.stride) * span.stride
    tiles = max(1, (length + wanted // 2) // wanted)
    return -(-length // (tiles * span.stride)) * span.stride
