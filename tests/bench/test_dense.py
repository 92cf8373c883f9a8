from __future__ import annotations

from vitzoo.bench import dense
from vitzoo.bench.dense import Case, Result


def test_a_small_case_is_measured_in_a_process_of_its_own():
    found = dense.measure(Case("nat_micro", (64, 96), train=True, checkpoint=True), rounds=1)
    assert found.why == ""
    assert found.seconds > 0
    assert 1 < found.memory_mib < 2000


def test_what_does_not_run_is_a_row_with_its_reason():
    found = dense.measure(Case("nat_mikro", (64, 96)), rounds=1)
    assert found.seconds is None
    assert "nat_mikro" in found.why
    assert "did not run" in dense.table([found])


def test_timm_is_measured_where_it_has_the_model():
    assert dense.has_baseline("swin_tiny_patch4_window7_224")
    assert not dense.has_baseline("nat_tiny")
    cases = dense.cases(["swin_tiny_patch4_window7_224", "nat_tiny"], [(64, 64)], train=True)
    assert [(c.model[:3], c.checkpoint, c.theirs) for c in cases] == [
        ("swi", False, False),
        ("swi", True, False),
        ("swi", False, True),
        ("nat", False, False),
        ("nat", True, False),
    ]


def test_the_table_names_size_and_pass():
    row = dense.table([Result(Case("nat_tiny", (800, 1333), train=True), 1.25, 512.0)]).splitlines()[-1]
    assert row == "| nat_tiny | vitzoo | 800x1333 | forward and backward | 1.25 | 512 |"
