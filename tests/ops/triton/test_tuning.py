"""Tuning with a clock that the test winds: what is chosen, how seldom, and what is left on disk whoever else writes there."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vitzoo.ops._triton import tuning

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

KEY = ("attend", "forward", 32, 90, torch.bfloat16)


class Tiles(NamedTuple):
    rows: int
    warps: int


RULE, SMALL, LARGE, HUGE = Tiles(64, 4), Tiles(32, 2), Tiles(128, 8), Tiles(256, 8)
TIMES = {RULE: 3.0, SMALL: 2.0, LARGE: 4.0, HUGE: 1.0}


class Bench:
    """Launches that take what `TIMES` says, on a clock of their own: a second to compile, and no time to run."""

    def __init__(self, folder: Path, too_large: tuple[Tiles, ...] = (), compile_seconds: float = 1.0) -> None:
        self.tried: list[Tiles] = []
        self.now = 0.0
        self.too_large, self.compile_seconds = too_large, compile_seconds
        self.tuner = tuning.Tuner(folder, self.time, clock=lambda: self.now)

    def run(self, tiles: Tiles) -> None:
        from triton.runtime.errors import OutOfResources

        self.tried.append(tiles)
        if tiles in self.too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")

    def time(self, launch) -> float:
        launch()
        self.now += self.compile_seconds
        return TIMES[self.tried[-1]]

    def choose(self, key=KEY, others=(SMALL, LARGE)) -> Tiles:
        return self.tuner.choose(key, RULE, lambda: others, self.run)


def test_the_fastest_is_chosen_and_nothing_is_timed_twice(tmp_path):
    bench = Bench(tmp_path)
    assert bench.choose() == SMALL
    assert bench.tried == [RULE, SMALL, LARGE]
    assert bench.choose() == SMALL
    assert len(bench.tried) == 3
    bench.choose(key=(*KEY[:2], 64, *KEY[3:]))  # another head dimension is another question
    assert len(bench.tried) == 6


def test_the_next_process_reads_what_this_one_chose(tmp_path):
    Bench(tmp_path).choose()
    later = Bench(tmp_path)
    choice = later.choose()
    assert choice == SMALL
    assert isinstance(choice, Tiles)
    assert not later.tried
    (file,) = tmp_path.iterdir()
    assert file.name == "attend-forward-32-90-bfloat16.json"
    assert json.loads(file.read_text())["milliseconds"] == [[[64, 4], 3.0], [[32, 2], 2.0], [[128, 8], 4.0]]


def test_what_does_not_fit_the_gpu_is_passed_over(tmp_path):
    assert Bench(tmp_path, too_large=(SMALL,)).choose() == RULE
    assert Bench(tmp_path / "other", too_large=(RULE, SMALL, LARGE)).choose() == RULE  # its launch says what is wrong
    assert not (tmp_path / "other").exists()


def test_another_error_is_not_swallowed(tmp_path):
    bench = Bench(tmp_path)
    bench.run = lambda tiles: 1 // 0
    with pytest.raises(ZeroDivisionError):
        bench.choose()


def test_tuning_ends_when_it_has_taken_its_seconds(tmp_path):
    bench = Bench(tmp_path, compile_seconds=tuning.SECONDS_PER_KEY)
    assert bench.choose(others=(SMALL, LARGE, HUGE)) == SMALL
    assert bench.tried == [RULE, SMALL]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"choice": 3}', "\x00\xff"])
def test_a_corrupt_file_is_ignored_with_one_warning_and_written_again(tmp_path, text):
    bench = Bench(tmp_path)
    other = ("attend", "dq", *KEY[2:])
    for key in (KEY, other):
        bench.tuner.path(key).write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="cannot be read and is ignored") as caught:
        choices = [bench.choose(), bench.choose(key=other)]
    assert choices == [SMALL, SMALL]
    assert len(caught) == 1
    assert len(bench.tried) == 6
    later = Bench(tmp_path)
    assert later.choose() == SMALL
    assert not later.tried


def test_a_choice_that_is_no_candidate_any_more_is_made_again(tmp_path):
    Bench(tmp_path).choose(others=(HUGE,))
    later = Bench(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert later.choose() == SMALL
    assert later.tried == [RULE, SMALL, LARGE]


def test_a_folder_that_cannot_be_written_costs_the_cache_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("")
    bench = Bench(tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="cannot be") as caught:
        choices = [bench.choose(), bench.choose(key=("attend", "dq"))]
    assert choices == [SMALL, SMALL]
    assert len(caught) == 1


def _choose_many(folder: Path, names: list[str], together) -> None:
    together.wait()
    for name in names:
        Bench(folder).choose(key=("attend", name))


def test_two_processes_that_write_at_once_lose_nothing_of_each_other(tmp_path):
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    together = context.Barrier(2)
    shared, own = [f"shared {i}" for i in range(20)], [[f"{who} {i}" for i in range(20)] for who in "ab"]
    writers = [context.Process(target=_choose_many, args=(tmp_path, shared + names, together)) for names in own]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 60  # and no file half written
    reader = Bench(tmp_path)
    assert all(reader.choose(key=("attend", name)) == SMALL for name in [*shared, *own[0], *own[1]])
    assert not reader.tried


def test_gpu_triton_and_vitzoo_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("VITZOO_CACHE", str(tmp_path))
    folders = {
        tuning.folder(*facts)
        for facts in (("H200", "3.8", "1"), ("A100", "3.8", "1"), ("H200", "3.9", "1"), ("H200", "3.8", "2"))
    }
    assert len(folders) == 4
    odd = tuning.folder("NVIDIA H200 / MIG 1g.18gb", "3.8", "1")
    assert odd.parent == tmp_path / "tuning"
    monkeypatch.delenv("VITZOO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.folder("H200", "3.8", "1").parent == tmp_path / "xdg" / "vitzoo" / "tuning"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that says it has a GPU, whose launches take what `TIMES` says."""
    bench = Bench(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_tuner", lambda device: bench.tuner)
    return bench


@pytest.mark.parametrize(("setting", "choice"), [(None, RULE), ("0", RULE), ("1", SMALL)])
def test_nothing_is_tuned_nor_read_unless_asked_for(monkeypatch, gpu, setting, choice):
    Bench(gpu.tuner.folder).choose()
    monkeypatch.delenv("VITZOO_AUTOTUNE", raising=False)
    if setting is not None:
        monkeypatch.setenv("VITZOO_AUTOTUNE", setting)
    assert tuning.choose(KEY, RULE, lambda: (SMALL, LARGE), gpu.run) == choice
    assert not gpu.tried


def test_deterministic_mode_and_captured_graphs_take_the_rule(monkeypatch, gpu):
    monkeypatch.setenv("VITZOO_AUTOTUNE", "1")
    torch.use_deterministic_algorithms(True)
    try:
        assert tuning.choose(KEY, RULE, lambda: (SMALL,), gpu.run) == RULE
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose(KEY, RULE, lambda: (SMALL,), gpu.run) == RULE
    assert not gpu.tried


def test_what_was_measured_offline_needs_no_tuning(monkeypatch, gpu):
    monkeypatch.setenv("VITZOO_AUTOTUNE", "1")
    monkeypatch.setitem(tuning.TUNED, KEY, (16, 1))
    assert tuning.choose(KEY, RULE, lambda: (SMALL,), gpu.run) == Tiles(16, 1)
    assert not gpu.tried
