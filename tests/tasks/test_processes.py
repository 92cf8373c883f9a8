"""Training in several processes on the CPU (gloo): the same curve, the same weights, each held-out picture once."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import vitzoo
from tests.data.pictures import by_class
from vitzoo.data import ImageData
from vitzoo.tasks.sharding import blocks_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in one process, in two, and in two that divide the weights; 9 held-out pictures."""
    folder = tmp_path_factory.mktemp("runs")
    by_class(folder / "pictures", train=8, val=3)
    common = [
        "fit", "--config", "configs/finetune/folder.yaml", "--data.root", folder / "pictures", "--model.name", "nat_micro",
        "--model.pretrained", "false", "--data.img_size", 32, "--data.num_workers", 0, "--trainer.accelerator", "cpu",
        "--data.batch_size", 6, "--model.drop_path", 0, "--model.lr", 0.01, "--model.warmup_epochs", 0, "--save_every", 1,
        "--trainer.max_epochs", 2, "--trainer.devices", "{world}", "--trainer.log_every_n_steps", 1,
        "--trainer.strategy", "{strategy}", "--out", folder / "{world}-{strategy}",
    ]  # fmt: skip
    command = [sys.executable, "tests/several_processes.py", "1:auto,2:ddp,2:fsdp2", "--", *common]
    ran = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert ran.returncode == 0, ran.stderr[-5000:]
    assert ran.stdout.count("on 9 held-out pictures") == 3
    return folder


def losses(run: Path) -> dict[int, float]:
    """The training loss of each update, as TensorBoard shows it."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


@pytest.mark.parametrize("other", ["2-ddp", "2-fsdp2"])
def test_the_same_global_batch_gives_the_same_loss_curve_on_two_processes(runs, other):
    alone = losses(runs / "1-auto")
    assert sorted(alone) == list(range(1, 9))
    assert max(alone.values()) > 2 * min(alone.values())  # there is a curve to compare
    assert losses(runs / other) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("other", ["2-ddp", "2-fsdp2"])
def test_two_processes_end_with_the_weights_and_figures_of_one(runs, other):
    one, two = (torch.load(runs / name / "last.ckpt", weights_only=True) for name in ("1-auto", other))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-4, atol=2e-6)
    figures = [json.loads((runs / name / "val_figures.json").read_text()) for name in ("1-auto", other)]
    assert figures[0]["pictures"] == figures[1]["pictures"] == 9
    assert figures[1]["figures"] == pytest.approx(figures[0]["figures"], rel=1e-5)
    tables = [list(csv.reader(open(runs / name / "val_confusion.csv"))) for name in ("1-auto", other)]  # noqa: SIM115
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("world", "pictures"), [(1, 9), (2, 9), (4, 9), (3, 2)])
def test_evaluation_repeats_and_loses_nothing_on_several_devices(runs, world, pictures):
    served: list[int] = []
    for rank in range(world):
        data: Any = ImageData(str(runs / "pictures"), batch_size=4, num_workers=0)
        data.sets = {"val": range(pictures)}
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        served += [int(number) for batch in data.val_dataloader() for number in batch]
    assert sorted(served) == list(range(pictures))


def test_what_is_divided_is_blocks():
    model = vitzoo.create_model("nat_micro")
    blocks = blocks_of(model)
    assert len(blocks) == sum(model.cfg.depths)
    assert len({type(block) for block in blocks}) == 1
    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert blocks_of(plain) == list(plain[1])


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_two_processes_train_a_dense_task_and_evaluate_as_one(tmp_path, task):
    scenes = [
        "--config", f"configs/{task}/quickstart.yaml", "--data.train_scenes", 8, "--data.val_scenes", 5,
        "--data.scene_size", 64, "--data.batch_size", 4, "--trainer.accelerator", "cpu", "--trainer.devices", "{world}",
        "--trainer.strategy", "{strategy}", "--out", tmp_path, *(["--data.crop", 64] if task == "segmentation" else []),
    ]  # fmt: skip
    once = ["--trainer.max_epochs", 1, "--trainer.check_val_every_n_epoch", 1]
    found = []
    for runs, words in (("2:ddp", ["fit", *scenes, *once]), ("1:auto", ["validate", *scenes])):
        command = [sys.executable, "tests/several_processes.py", runs, "--", *words]
        ran = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
        assert ran.returncode == 0, ran.stderr[-5000:]
        found.append(json.loads((tmp_path / "val_figures.json").read_text()))
    together, alone = found
    assert together["pictures"] == alone["pictures"] == 5
    assert together["figures"] == pytest.approx(alone["figures"], rel=1e-5)
