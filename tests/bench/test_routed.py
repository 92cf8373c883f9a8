"""The table of attend_routed: both forms agree before they are timed, and the gathered one is the larger."""

from __future__ import annotations

import pytest

from vitzoo.bench import routed


def test_a_case_is_measured_against_the_gathered_form():
    case = routed.Case(224, 16, 2, 16, batch=16)
    result = routed.measure(case, rounds=1)
    assert result.error < 1e-5
    assert result.gathered_mib > 4 * case.least_mib
    assert "| 16 of 49 |" in routed.table([result])


def test_a_wrong_op_is_not_timed(monkeypatch):
    monkeypatch.setattr(routed, "ours", lambda q, k, v, graph: v * 1.0)
    with pytest.raises(RuntimeError, match="not timed"):
        routed.measure(routed.Case(56, 4, 1, 2), rounds=1)
