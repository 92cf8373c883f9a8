"""The benchmarks measure the right thing or nothing; no time is asserted."""

from __future__ import annotations

import json

import pytest
import torch

from vitzoo.bench import __main__ as command
from vitzoo.bench import ops, timing, token_ops
from vitzoo.patterns import grid, neighborhood, window

CPU = torch.device("cpu")
SMALL = [ops.OpCase(window(3), 2, (6, 9)), ops.OpCase(neighborhood(3, dilation=2), 1, (7, 8), bias=False)]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_way_that_takes_a_case_computes_the_same(case):
    result = ops.measure(case, CPU, torch.float32, rounds=1)
    assert next(iter(result.forward_ms)) == "pytorch"
    for name in result.forward_ms:
        assert ops.error_of(ops.ways(CPU)[name], case, CPU, torch.float32) < 1e-5, name
    assert set(result.forward_ms) | set(result.refused) == set(ops.ways(CPU))


def test_a_way_that_cannot_run_a_case_says_why():
    result = ops.measure(ops.OpCase(grid(2), 1, (6, 8)), CPU, torch.float32, rounds=1)
    assert list(result.forward_ms) == ["pytorch"]
    assert "unshifted" in result.refused["sdpa + bias"]


def test_a_wrong_op_is_not_timed(monkeypatch):
    monkeypatch.setattr(ops, "ways", lambda device: {"pytorch": lambda q, k, v, pattern, table: v * 1.0})
    with pytest.raises(RuntimeError, match="not timed"):
        ops.measure(SMALL[1], CPU, torch.float32, rounds=1)


@pytest.mark.parametrize("op", ["linear_attend", "channel_attend"])
def test_ops_on_tokens_are_measured_by_the_same_rules(monkeypatch, op):
    case = token_ops.TokenCase(op, 2, 35, head_dim=8)
    result = token_ops.measure(case, CPU, torch.float32, rounds=1)
    assert list(result.forward_ms) == ["pytorch"]
    assert "GPU" in result.refused["compiled"]
    monkeypatch.setattr(token_ops, "ways", lambda device: {"pytorch": lambda q, k, v, op: v * 1.0})
    with pytest.raises(RuntimeError, match="not timed"):
        token_ops.measure(case, CPU, torch.float32, rounds=1)


def test_the_command_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ops, "CPU_CASES", SMALL)
    monkeypatch.setattr(token_ops, "CPU_CASES", [token_ops.TokenCase("linear_attend", 1, 20, head_dim=8)])
    assert (
        command.main(["ops", "--device", "cpu", "--dtype", "float32", "--rounds", "1", "--json", str(tmp_path / "x.json")]) == 0
    )
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert all(row["case"] in printed for row in written["results"])


def test_interleaved_times_every_run_in_every_round():
    calls = []
    medians = timing.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], CPU, rounds=3, warm_up=1)
    assert len(medians) == 2
    assert sorted(calls) == ["a"] * 4 + ["b"] * 4
