"""Who sees whom on a map: five integers per axis, and the papers' names for them.

Attention in two dimensions asks one question per axis: which coordinates does this coordinate see? A `Span` answers it,
a `Pattern` is one span for the rows and one for the columns, and a query sees a key when both axes say so.

    residue r = i % step, position m = i // step             # m runs over the n_r coordinates of residue r
    start = floor((m - shift) / stride) * stride + shift + stride // 2 - size // 2
    edge "clamp": start = clip(start, 0, n_r - size)         # the run moves inward at a border
    edge "truncate": the run is cut at the border
    i sees j  <=>  j % step == r  and  start <= j // step < start + size

Words used throughout: an axis of *n* coordinates falls into *step* residue classes; the class of residue r has a *length* n_r
and is counted in *positions*. The keys a query sees form one run of positions, and so do the queries that see a key.

This module is integers only: it imports no torch, and its values are frozen, hashable and picklable.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

EDGES = ("truncate", "clamp", "cover")


def _whole(value: object, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


@dataclass(frozen=True, slots=True, repr=False)
class Span:
    """The run of keys that each coordinate of one axis sees, by the rule at the top of this module.

    Args:
        size: how many positions a run holds; None is the whole axis (its residue class, where step is not 1).
        step: distance between neighbouring positions, in coordinates; None is axis // size (a grid).
        stride: how many neighbouring queries share a run; None is size, so that runs partition the axis.
        shift: where the first full run of queries begins, 0 <= shift < stride.
        edge: "truncate" cuts a run at the border, "clamp" moves it inward, "cover" is "truncate" with the shift left out
            on an axis that one run covers (the per-axis rule of timm's Swin).
    """

    size: int | None
    step: int | None = 1
    stride: int | None = 1
    shift: int = 0
    edge: str = "truncate"

    def __post_init__(self) -> None:
        if self.edge not in EDGES:
            raise ValueError(f"edge must be one of {', '.join(EDGES)}, got {self.edge!r}.")
        if self.step is not None:
            _whole(self.step, "step", 1)
        _whole(self.shift, "shift", 0)
        if self.size is None:
            if self.step is None or self.stride not in (None, 1) or self.shift:
                raise ValueError("A span over the whole axis (size None) takes a step and nothing else.")
            object.__setattr__(self, "stride", None)
            object.__setattr__(self, "edge", "truncate")
            return
        _whole(self.size, "size", 1)
        if self.step is None and (self.stride not in (None, self.size) or self.shift or self.edge != "truncate"):
            raise ValueError("A grid (step None) has stride equal to size, no shift, and edge truncate.")
        if self.stride is None:
            object.__setattr__(self, "stride", self.size)
        _whole(self.stride, "stride", 1)
        if self.stride > self.size:
            raise ValueError(f"stride {self.stride} exceeds size {self.size}: some queries would not see themselves.")
        if self.shift >= self.stride:
            raise ValueError(f"shift must be smaller than stride {self.stride}, got {self.shift}.")

    def __repr__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return f"Span({', '.join([repr(self.size), *changed])})" if self.size is not None else _repr_whole(self)

    def check(self, n: int, axis: str = "coordinates", owner: object = None) -> None:
        """Raise ValueError when this span has no meaning on an axis of `n` coordinates."""
        owner = self if owner is None else owner  # its repr is made only where it is needed: Dynamo traces this
        if n < 1:
            raise ValueError(f"{owner!r} needs at least 1 of {axis}, got {n}.")
        if self.step is None and n % self.size:
            raise ValueError(
                f"{owner!r} needs a number of {axis} that {self.size} divides, got {n}. "
                f"Pad the map to a multiple of {self.size} first."
            )
        if self.edge == "clamp":
            needed = self.size * self.step
            if n < needed:
                raise ValueError(
                    f"{owner!r} needs {needed} {axis}, got {n}. Use a smaller dilation or kernel size at this stage."
                )

    def resolve(self, n: int) -> Span:
        """The same span on an axis of `n` coordinates with every field an integer and edge "truncate" or "clamp".

        Raises ValueError where `check` does.
        """
        self.check(n)
        if self.size is None:
            length = -(-n // self.step)
            return Span(length, self.step, length)
        step = n // self.size if self.step is None else self.step
        if self.edge == "cover":
            one_run = -(-n // step) <= self.stride
            return replace(self, step=step, shift=0 if one_run else self.shift, edge="truncate")
        return replace(self, step=step)

    @property
    def partitions(self) -> bool:
        """Whether the runs split the axis: every coordinate of a run sees exactly that run."""
        return (self.size == self.stride and self.edge != "clamp") or self.size is None

    def reach(self, n: int | None = None) -> int:
        """Largest distance between a query and a key it sees, in positions; `n` is needed only where size is None.

        It does not depend on the axis otherwise, so a bias table of 2 * reach + 1 entries serves every resolution.
        """
        if self.size is None:
            if n is None:
                raise ValueError(f"The reach of {self!r} is that of its axis: say how many coordinates it has.")
            return -(-n // self.step) - 1
        if self.edge == "clamp":
            return self.size - 1
        ahead = self.stride // 2 - self.size // 2 + self.size - 1
        behind = self.stride - 1 - self.stride // 2 + self.size // 2
        return max(ahead, behind)

    # The four methods below count positions inside one residue class of a resolved span.

    @property
    def base(self) -> int:
        """Start of the run that the queries [shift, shift + stride) see, before any border."""
        return self.shift + self.stride // 2 - self.size // 2

    def start(self, m: int, length: int) -> int:
        """First position of the run that query position `m` sees; negative where a truncated run leaves the axis."""
        start = (m - self.shift) // self.stride * self.stride + self.base
        return max(0, min(start, length - self.size)) if self.edge == "clamp" else start

    def first(self, k: int, length: int) -> int:
        """First query position that sees key position `k`; monotone in `k`."""
        if self.edge == "clamp" and k < self.size:
            return 0
        return max(0, -((self.base + self.size - 1 - k) // self.stride) * self.stride + self.shift)

    def end(self, k: int, length: int) -> int:
        """One past the last query position that sees key position `k`; monotone in `k`."""
        if self.edge == "clamp" and k >= length - self.size:
            return length
        return min(length, ((k - self.base) // self.stride + 1) * self.stride + self.shift)

    # The methods below count coordinates of an axis of n, and take any span.

    def length(self, r: int, n: int) -> int:
        """How many of `n` coordinates leave residue `r`."""
        return (n - r + self.step - 1) // self.step

    def keys(self, i: int, n: int) -> range:
        """The coordinates that coordinate `i` of `n` sees."""
        span = self.resolve(n)
        m, r = divmod(i, span.step)
        length = span.length(r, n)
        start = span.start(m, length)
        stop = min(start + span.size, length)
        return range(max(start, 0) * span.step + r, (stop - 1) * span.step + r + 1, span.step)

    def queries(self, j: int, n: int) -> range:
        """The coordinates of `n` that see coordinate `j`: the dual of `keys`."""
        span = self.resolve(n)
        k, r = divmod(j, span.step)
        length = span.length(r, n)
        first, end = span.first(k, length), span.end(k, length)
        return range(first * span.step + r, (end - 1) * span.step + r + 1, span.step)

    def pairs(self, n: int) -> int:
        """How many (query, key) pairs an axis of `n` coordinates holds."""
        return sum(len(self.keys(i, n)) for i in range(n))


def _repr_whole(span: Span) -> str:
    return "Span(None)" if span.step == 1 else f"Span(None, step={span.step})"


@dataclass(frozen=True, slots=True, repr=False)
class Pattern:
    """A span for the rows and one for the columns: query (y, x) sees key (v, u) when y sees v and x sees u."""

    rows: Span
    cols: Span

    def __post_init__(self) -> None:
        for name, span in (("rows", self.rows), ("cols", self.cols)):
            if not isinstance(span, Span):
                raise ValueError(f"Pattern needs a Span for its {name}, got {span!r}.")

    def __repr__(self) -> str:
        return next(_nouns(self), f"Pattern({self.rows!r}, {self.cols!r})")

    def check(self, H: int, W: int) -> None:
        """Raise ValueError, in words, when this pattern has no meaning on a map of `H` rows and `W` columns."""
        self.rows.check(H, "rows", self)
        self.cols.check(W, "columns", self)

    def resolve(self, H: int, W: int) -> Pattern:
        """This pattern on an `H` x `W` map with every field an integer and edge "truncate" or "clamp"."""
        self.check(H, W)
        return Pattern(self.rows.resolve(H), self.cols.resolve(W))

    def reach(self, H: int | None = None, W: int | None = None) -> tuple[int, int]:
        """Largest (row, column) distance between a query and a key it sees, in positions."""
        return self.rows.reach(H), self.cols.reach(W)

    def keys(self, y: int, x: int, H: int, W: int) -> tuple[range, range]:
        """The rows and the columns of the keys that query (y, x) sees."""
        return self.rows.keys(y, H), self.cols.keys(x, W)

    def queries(self, y: int, x: int, H: int, W: int) -> tuple[range, range]:
        """The rows and the columns of the queries that see key (y, x)."""
        return self.rows.queries(y, H), self.cols.queries(x, W)

    def pairs(self, H: int, W: int) -> int:
        """How many (query, key) pairs an `H` x `W` map holds."""
        return self.rows.pairs(H) * self.cols.pairs(W)

    def to_ints(self) -> list[int]:
        """Ten integers that a dispatcher schema can carry: size, step, stride, shift, edge of each axis (None is 0)."""
        return [
            value
            for s in (self.rows, self.cols)
            for value in (s.size or 0, s.step or 0, s.stride or 0, s.shift, EDGES.index(s.edge))
        ]

    @classmethod
    def from_ints(cls, ints: list[int]) -> Pattern:
        """The pattern that `to_ints` wrote down."""
        spans = [
            Span(size or None, step or None, stride or None, shift, EDGES[edge])
            for size, step, stride, shift, edge in (ints[:5], ints[5:])
        ]
        return cls(*spans)


Pair = int | tuple[int, int]


def _pair(value: Pair, name: str, least: int = 1) -> tuple[int, int]:
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an integer or a pair (rows, columns), got {value!r}.")
    for each in pair:
        _whole(each, name, least)
    return tuple(pair)


def window(w: Pair, shift: Pair = 0, edge: str = "truncate") -> Pattern:
    """Windows of `w`, their borders moved down and right by `shift` and cut where the map ends (Swin, arXiv:2103.14030).

    A shifted window needs neither roll nor mask: it is a window cut at the border. With edge "cover" an axis that one
    window covers is not shifted.
    """
    if edge == "clamp":
        raise ValueError("A window is cut at the border, not moved: edge must be truncate or cover.")
    w, shift = _pair(w, "window"), _pair(shift, "shift", 0)
    return Pattern(*(Span(size, 1, size, s, edge) for size, s in zip(w, shift, strict=True)))


def grid(g: Pair) -> Pattern:
    """A `g` x `g` grid of queries spread evenly over the map sees itself (MaxViT, arXiv:2204.01697). `g` divides the map."""
    return Pattern(*(Span(size, None, size) for size in _pair(g, "grid")))


def dilated_window(g: Pair, interval: Pair) -> Pattern:
    """Windows of `g` tokens that lie `interval` apart (CrossFormer's long-distance attention, arXiv:2108.00154)."""
    pairs = zip(_pair(g, "group"), _pair(interval, "interval"), strict=True)
    return Pattern(*(Span(size, step, size) for size, step in pairs))


def stripe(*, rows: int | None = None, cols: int | None = None) -> Pattern:
    """Horizontal stripes of `rows` rows, or vertical ones of `cols` columns, across the map (CSWin, arXiv:2107.00652)."""
    if (rows is None) == (cols is None):
        raise ValueError("stripe takes its width in rows or in cols: exactly one of the two.")
    if rows is not None:
        _whole(rows, "rows", 1)
        return Pattern(Span(rows, stride=None), Span(None))
    _whole(cols, "cols", 1)
    return Pattern(Span(None), Span(cols, stride=None))


def axial(along: str) -> Pattern:
    """A query sees its own row (`along="row"`) or its own column (`along="column"`): a stripe of width 1."""
    if along not in ("row", "column"):
        raise ValueError(f'axial attention runs along "row" or "column", got {along!r}.')
    return stripe(rows=1) if along == "row" else stripe(cols=1)


def halo(block: Pair, halo: Pair) -> Pattern:
    """Blocks of queries see themselves and `halo` tokens around, cut at the border (HaloNet, arXiv:2103.12731)."""
    pairs = zip(_pair(block, "block"), _pair(halo, "halo", 0), strict=True)
    return Pattern(*(Span(b + 2 * h, 1, b) for b, h in pairs))


def neighborhood(k: Pair, dilation: Pair = 1, stride: Pair = 1) -> Pattern:
    """The `k` x `k` nearest tokens that lie `dilation` apart; a border moves the neighborhood inward (NAT, arXiv:2204.07143;
    DiNAT, arXiv:2209.15001). With `stride` that many queries share their central one's neighborhood (GNA, arXiv:2504.16922).
    """
    triples = zip(_pair(k, "kernel"), _pair(dilation, "dilation"), _pair(stride, "stride"), strict=True)
    return Pattern(*(Span(size, d, s, 0, "clamp") for size, d, s in triples))


everywhere = Pattern(Span(None), Span(None))
"""Every query sees every key."""


def _short(values: tuple[int, int]) -> str:
    return repr(values[0] if values[0] == values[1] else values)


def _nouns(pattern: Pattern) -> Iterator[str]:
    """Constructor calls that make `pattern`, the plainest first."""
    axes = pattern.rows, pattern.cols
    if all(s == Span(None) for s in axes):
        yield "everywhere"
    for side, this, other in (("rows", *axes), ("cols", *axes[::-1])):
        if other == Span(None) and this.size is not None and this == Span(this.size, stride=None):
            yield f"stripe({side}={this.size})"
    if any(s.size is None for s in axes):
        return
    size, step, stride, shift, edge = (tuple(getattr(s, f.name) for s in axes) for f in fields(Span))
    margin = tuple((a - b) // 2 for a, b in zip(size, stride, strict=True))
    extra = [] if shift == (0, 0) else [f"shift={_short(shift)}"]
    extra += [] if edge[0] == "truncate" else [f"edge={edge[0]!r}"]
    candidates = [
        ("window", [_short(size), *extra], lambda: window(size, shift, edge[0])),
        ("grid", [_short(size)], lambda: grid(size)),
    ]
    if None not in step:
        candidates.append(("dilated_window", [_short(size), f"interval={_short(step)}"], lambda: dilated_window(size, step)))
        candidates.append(("halo", [_short(stride), _short(margin)], lambda: halo(stride, margin)))
        more = [f"{n}={_short(v)}" for n, v in (("dilation", step), ("stride", stride)) if v != (1, 1)]
        candidates.append(("neighborhood", [_short(size), *more], lambda: neighborhood(size, step, stride)))
    for name, arguments, build in candidates:
        try:
            same = build() == pattern
        except ValueError:
            same = False
        if same:
            yield f"{name}({', '.join(arguments)})"
