"""The benchmarks measure the right thing or nothing; no time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitzoo.bench import __main__ as command
from vitzoo.bench import data, ops, timing, token_ops, training
from vitzoo.data.folders import find_splits
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


def test_a_step_of_train_py_is_timed_beside_a_bare_one():
    step = training.measure_step(batch=8, rounds=1, steps=training.SKIPPED + 2)
    assert all(0 < value < 60_000 for value in (step.bare, step.ours, step.bare_cpu, step.ours_cpu))
    assert training.table([step]).count("|") == 18
    assert not list(Path.cwd().glob("tensorboard"))


def test_the_loader_is_timed_on_pictures_that_are_made_up(tmp_path):
    folder = data.folder_of_photographs(tmp_path, files=4, links=3, size=(60, 40))
    assert len(list((folder / "train").glob("*/*.jpg"))) == 12
    results = data.loading(
        "nat_micro", root=str(folder), config=None, batch=4, size=32, workers=[0, 1], pictures=8, rounds=1
    )  # fmt: skip
    assert [result.workers for result in results] == [0, 1]
    assert all(result.loader > 0 for result in results)
    assert "training waits" in data.table(results)


def test_training_waits_for_what_the_loader_lacks():
    assert data.Loading(4, loader=80, step=100).waits == pytest.approx(0.2)
    assert data.Loading(4, loader=300, step=100).waits == 0
    assert data.Loading(0, loader=100, step=100).waits == pytest.approx(0.5)  # nothing overlaps in one process


def test_a_difference_is_told_beside_its_noise():
    said = training.parity_table({"timm": [90.0, 92.0], "ours": [91.0, 95.0]})
    assert "ours - timm: +2.00, standard error of the difference 2.24" in said


def test_digits_become_folders_that_timm_and_we_read_alike(tmp_path):
    training.digits_as_folders(tmp_path)
    classes, splits = find_splits(str(tmp_path))
    assert classes == list("0123456789")
    assert (len(splits["train"]), len(splits["val"])) == (1437, 360)
