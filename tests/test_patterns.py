"""Patterns as values, and the properties that every span has."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitzoo.patterns import (
    Pattern,
    Span,
    axial,
    dilated_window,
    everywhere,
    grid,
    halo,
    neighborhood,
    stripe,
    window,
)


@st.composite
def spans_on_axes(draw):
    """A span and a number of coordinates on which it has a meaning."""
    kind = draw(st.sampled_from(["truncate", "clamp", "cover", "grid", "whole"]))
    if kind == "whole":
        return Span(None, draw(st.integers(1, 4))), draw(st.integers(1, 30))
    size = draw(st.integers(1, 9))
    if kind == "grid":
        return Span(size, None, size), size * draw(st.integers(1, 5))
    step, stride = draw(st.integers(1, 4)), draw(st.integers(1, size))
    shift = draw(st.integers(0, stride - 1))
    least = size * step if kind == "clamp" else 1
    return Span(size, step, stride, shift, kind), draw(st.integers(least, least + 30))


def brute_force_keys(span: Span, i: int, n: int) -> list[int]:
    """The rule of the design, word for word, on a resolved span."""
    r, m = i % span.step, i // span.step
    length = len(range(r, n, span.step))
    start = (m - span.shift) // span.stride * span.stride + span.shift + span.stride // 2 - span.size // 2
    if span.edge == "clamp":
        start = min(max(start, 0), length - span.size)
    return [j for j in range(n) if j % span.step == r and start <= j // span.step < start + span.size]


@given(spans_on_axes())
def test_keys_are_those_of_the_rule(case):
    span, n = case
    resolved = span.resolve(n)
    assert all(list(span.keys(i, n)) == brute_force_keys(resolved, i, n) for i in range(n))


@given(spans_on_axes())
def test_every_query_sees_itself(case):
    span, n = case
    assert all(i in span.keys(i, n) for i in range(n))


@given(spans_on_axes())
def test_queries_are_the_dual_of_keys(case):
    span, n = case
    for j in range(n):
        assert list(span.queries(j, n)) == [i for i in range(n) if j in span.keys(i, n)]


@given(spans_on_axes())
def test_first_and_end_never_decrease(case):
    span, n = case
    span = span.resolve(n)
    length = span.length(0, n)
    firsts, ends = ([f(k, length) for k in range(length)] for f in (span.first, span.end))
    assert firsts == sorted(firsts)
    assert ends == sorted(ends)


@given(spans_on_axes())
def test_reach_is_never_exceeded_and_is_constant_where_it_can_be(case):
    span, n = case
    resolved = span.resolve(n)
    for i in range(n):
        assert all(abs(j - i) <= span.reach(n) * resolved.step for j in span.keys(i, n))
    if span.size is not None:
        assert span.reach() == span.reach(n)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from(["truncate", "clamp"]))
def test_reach_is_attained_on_a_large_axis(size, stride, edge):
    span = Span(size, 1, min(stride, size), 0, edge)
    n = 8 * size
    assert max(abs(j - i) for i in range(n) for j in span.keys(i, n)) == span.reach()


@given(spans_on_axes())
def test_pairs_counts_pairs(case):
    span, n = case
    assert span.pairs(n) == sum(len(brute_force_keys(span.resolve(n), i, n)) for i in range(n))


@given(spans_on_axes())
def test_resolve_gives_integers_and_changes_nothing_the_second_time(case):
    span, n = case
    resolved = span.resolve(n)
    assert all(isinstance(x, int) for x in (resolved.size, resolved.step, resolved.stride, resolved.shift))
    assert resolved.edge in ("truncate", "clamp")
    assert resolved.resolve(n) == resolved


@given(spans_on_axes())
def test_a_partition_is_an_equivalence(case):
    span, n = case
    if span.partitions:
        assert all(span.keys(j, n) == span.keys(i, n) for i in range(n) for j in span.keys(i, n))


@settings(max_examples=50)
@given(spans_on_axes(), spans_on_axes())
def test_patterns_are_values(rows, cols):
    pattern = Pattern(rows[0], cols[0])
    for same in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern), Pattern.from_ints(pattern.to_ints())):
        assert same == pattern
        assert hash(same) == hash(pattern)
    assert eval(repr(pattern)) == pattern


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (window(7), "window(7)"),
        (window(7, shift=3), "window(7, shift=3)"),
        (window((7, 5), shift=(3, 2), edge="cover"), "window((7, 5), shift=(3, 2), edge='cover')"),
        (grid(7), "grid(7)"),
        (dilated_window(7, interval=4), "dilated_window(7, interval=4)"),
        (stripe(rows=2), "stripe(rows=2)"),
        (axial("column"), "stripe(cols=1)"),
        (everywhere, "everywhere"),
        (halo(8, 3), "halo(8, 3)"),
        (neighborhood(7, dilation=2), "neighborhood(7, dilation=2)"),
        (neighborhood(7, stride=2), "neighborhood(7, stride=2)"),
        (Pattern(Span(5), Span(None)), "Pattern(Span(5), Span(None))"),
        (Span(7, 2, 3, 1, "clamp"), "Span(7, step=2, stride=3, shift=1, edge='clamp')"),
    ],
)
def test_repr_is_the_constructor_call(pattern, text):
    assert repr(pattern) == text


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: window(0), "window must be an integer of at least 1, got 0"),
        (lambda: window(7.0), "window must be an integer"),
        (lambda: window(True), "window must be an integer"),
        (lambda: window((7, 7, 7)), "pair"),
        (lambda: window(7, shift=7), "shift must be smaller than stride 7, got 7"),
        (lambda: window(7, edge="clamp"), "edge must be truncate or cover"),
        (lambda: window(7, edge="wrap"), "edge must be one of truncate, clamp, cover"),
        (lambda: neighborhood(3, stride=4), "would not see themselves"),
        (lambda: stripe(), "exactly one"),
        (lambda: stripe(rows=1, cols=1), "exactly one"),
        (lambda: axial("diagonal"), '"row" or "column"'),
        (lambda: Span(None, 1, 3), "size None"),
        (lambda: Span(3, None, 1), "grid"),
        (lambda: Pattern(7, 7), "needs a Span"),
        (lambda: everywhere.reach(), "how many coordinates"),
    ],
)
def test_wrong_arguments_are_told_in_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        make()


@pytest.mark.parametrize(
    ("pattern", "size", "message"),
    [
        (
            neighborhood(7, dilation=4),
            (14, 56),
            "neighborhood(7, dilation=4) needs 28 rows, got 14. Use a smaller dilation or kernel size at this stage.",
        ),
        (neighborhood((3, 7)), (3, 6), "neighborhood((3, 7)) needs 7 columns, got 6."),
        (grid(7), (14, 15), "grid(7) needs a number of columns that 7 divides, got 15. Pad the map to a multiple of 7 first."),
    ],
)
def test_a_map_that_does_not_fit_is_refused(pattern, size, message):
    for refuse in (pattern.check, pattern.resolve):
        with pytest.raises(ValueError) as error:
            refuse(*size)
        assert str(error.value).startswith(message)


def test_cover_drops_the_shift_only_where_one_run_covers_the_axis():
    shifted, plain = window(7, shift=3), window(7)
    cover = window(7, shift=3, edge="cover")
    assert cover.resolve(7, 8) == Pattern(plain.rows, shifted.cols)
    assert cover.resolve(5, 14) == Pattern(plain.rows, shifted.cols)
