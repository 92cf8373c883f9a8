"""Calls whose kernels run with every configuration that tuning may choose: each must compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tests.ops.triton import attend2d_cases, attend_cases, product_cases
from vitzoo.patterns import neighborhood, window


class Case(NamedTuple):
    measure: Callable[[Any], dict[str, float]]
    case: Any


CASES = {
    "candidates: joined windows": Case(attend2d_cases.measure, attend2d_cases.Case(window(3, shift=1), (5, 6), N=1)),
    "candidates: windows in packs": Case(attend2d_cases.measure, attend2d_cases.Case(window(2, shift=1), (3, 5), N=1)),
    "candidates: neighborhoods": Case(attend2d_cases.measure, attend2d_cases.Case(neighborhood(3), (5, 9), N=1)),
    "candidates: attend": Case(attend_cases.measure, attend_cases.Case(40, 35, N=1, B=1, bias=(1, 40, 35), key_bias=True)),
    "candidates: linear_attend": Case(product_cases.measure, product_cases.Case("linear", 40, 70, N=1, B=1)),
    "candidates: channel_attend": Case(product_cases.measure, product_cases.Case("channel", 40, 70, N=1, B=1)),
}


def measure(case: Case) -> dict[str, float]:
    """The largest error of any result by the number of the candidate that every kernel ran with; the rule's is 0."""
    from vitzoo.ops._triton import tuning

    errors: dict[str, float] = {}
    number, most = 0, 1
    usual = tuning.choose

    def choose(key, rule, others, run):
        nonlocal most
        candidates = [rule, *others()]
        most = max(most, len(candidates))
        return candidates[number % len(candidates)]

    try:
        tuning.choose = choose
        while number < most:
            errors[f"candidate {number}"] = max(case.measure(case.case).values())
            number += 1
    finally:
        tuning.choose = usual
    return errors
