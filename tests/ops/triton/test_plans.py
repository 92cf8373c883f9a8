"""Tiles as the host plans them: every position once, and no pair of two tiles outside the wide bias table."""

from __future__ import annotations

import importlib.util

import pytest

from vitzoo.patterns import Span

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SPANS = [
    Span(size, 1, stride, shift, edge)
    for size in (1, 2, 5, 7, 12)
    for stride in {1, 2, 3, size}
    if stride <= size
    for shift in {0, stride // 2}
    for edge in ("truncate", "clamp")
]
LENGTHS = (1, 5, 12, 17, 31)


def extents(plan, length: int, block: int):
    """(lo, first, hi) of every tile that is not empty: `_spans.tile_extent` on the host."""
    for t in range(plan.count):
        begin = plan.origin + t // plan.per * plan.period
        lo = begin + t % plan.per * block
        hi = min(lo + block, begin + plan.period, length)
        if max(lo, 0) < hi:
            yield lo, max(lo, 0), hi


@pytest.mark.parametrize("span", SPANS, ids=repr)
def test_tiles_cover_an_axis_once_and_stay_inside_the_wide_table(span):
    from vitzoo.ops.attend2d.triton import _spans

    for length in LENGTHS:
        if span.edge == "clamp" and length < span.size:
            continue
        for own in (1, 4, 8, 16):
            queries = list(extents(_spans.plan_queries(span, length, own), length, own))
            keys = list(extents(_spans.plan_keys(span, length, own), length, own))
            for tiles in (queries, keys):
                assert [m for _, first, hi in tiles for m in range(first, hi)] == list(range(length))
            for other in (2, 16, 32):
                margin = span.reach() + own + other  # launch.wide_table
                for lo, first, hi in queries:
                    start = max(span.start(first, length), 0)
                    stop = min(span.start(hi - 1, length) + span.size, length)
                    _inside(margin, lo, own, start, stop, other)
                for lo, first, hi in keys:
                    _inside(margin, lo, own, span.first(first, length), span.end(hi - 1, length), other)


def _inside(margin: int, lo: int, own: int, start: int, stop: int, other: int) -> None:
    last = start + -(-(stop - start) // other) * other - 1  # the last partner tile overshoots
    assert last - lo <= margin
    assert lo + own - 1 - start <= margin


def test_halo_keys_meet_two_runs_of_queries_and_not_three():
    from vitzoo.ops.attend2d.triton import _spans

    span = Span(14, 1, 8)  # halo(8, 3)
    widths = [span.end(hi - 1, 56) - span.first(first, 56) for _, first, hi in extents(_spans.plan_keys(span, 56, 8), 56, 8)]
    assert max(widths) == 16
