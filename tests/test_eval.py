"""`vitzoo eval`: ImageNet's sets on tiny made-up folders, several models in one table."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import vitzoo
from vitzoo.data import UserError
from vitzoo.data.images import DigitImages
from vitzoo.data.sets import ALEXNET_ERROR, SETS, EvalSet, mean_corruption_error, named_set
from vitzoo.tasks.evaluation import evaluate
from vitzoo_cli import _eval, main

ROOT = Path(__file__).resolve().parents[1]
SYNSETS = ImageNetInfo("imagenet-1k").label_names()
GOLDFISH, SHARK = 1, 2  # goldfish is in -R, and not in -A; great white shark likewise


def picture(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


class Says(torch.nn.Module):
    """Answers what the brightness of a picture's first pixel says."""

    def __init__(self, answers: dict[int, list[int]]) -> None:
        super().__init__()
        self.answers, self.num_classes = answers, 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 1000)
        for row, value in zip(logits, (255 * x[:, 0, 0, 0]).round().int().tolist(), strict=True):
            for place, label in enumerate(self.answers[value]):
                row[label] = 10.0 - place
        return logits


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def found_on(name: str, root: Path, answers: dict[int, list[int]], **options: Any) -> dict[str, Any]:
    return evaluate(Says(answers), named_set(name, root, pixels), batch_size=3, **options).figures


@pytest.mark.parametrize("inside", ["", "val", "imagenet-sketch"])
def test_class_folders_are_found_by_their_synset_wherever_they_lie(tmp_path, inside):
    picture(tmp_path / inside / SYNSETS[SHARK] / "a.png", 1)
    picture(tmp_path / inside / SYNSETS[998] / "b.png", 2)
    images = named_set("imagenet-sketch", tmp_path, pixels)
    assert images.accepted == [(SHARK,), (998,)]
    assert "2 of imagenet-sketch's 1000 classes" in images.notes[0]
    found = found_on("imagenet-sketch", tmp_path, {1: [SHARK], 2: [5, 998]})
    assert (found["top1"], found["top5"], found["pictures"]) == (50, 100, 2)


def test_v2_numbers_its_folders_in_the_order_of_the_classes(tmp_path):
    for number in (2, 10, 998):  # in the order of strings 10 would come first
        picture(tmp_path / "imagenetv2-matched-frequency-format-val" / str(number) / "a.png", number % 256)
    assert sorted(named_set("imagenet-v2", tmp_path, pixels).accepted) == [(2,), (10,), (998,)]
    with pytest.raises(UserError, match="no pictures in class folders"):
        named_set("imagenet", tmp_path, pixels)


def test_answers_are_taken_among_the_classes_of_the_set(tmp_path):
    """The likeliest of 1,000 classes is none of -R's 200: the likeliest of these counts."""
    r = named_set_of("imagenet-r", tmp_path)
    outside = next(i for i in range(1000) if i not in set(r.subset))
    assert found_on("imagenet-r", tmp_path, {7: [outside, GOLDFISH]})["top1"] == 100
    assert found_on("imagenet", tmp_path, {7: [outside, GOLDFISH]})["top1"] == 0
    with pytest.raises(UserError, match="none of imagenet-a's 200 classes"):
        named_set("imagenet-a", tmp_path, pixels)


def named_set_of(name: str, root: Path) -> EvalSet:
    picture(root / SYNSETS[GOLDFISH] / "a.png", 7)
    return named_set(name, root, pixels)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_the_subsets_are_200_classes_whose_names_fit(tmp_path, name):
    from importlib import resources

    wordnet = resources.files("timm.data").joinpath(f"_info/{name.replace('-', '_')}_synsets.txt").read_text().split()
    for synset in wordnet:
        picture(tmp_path / synset / "a.png", 1)
    images = named_set(name, tmp_path, pixels)
    assert images.notes == []
    assert [SYNSETS[i] for i in images.subset] == wordnet == [text.split()[0] for text in images.classes]
    assert len(set(images.subset)) == 200


def test_real_accepts_any_of_a_pictures_labels_and_skips_those_without(tmp_path):
    for number in (1, 2, 3, 4):
        picture(tmp_path / "val" / SYNSETS[3] / f"ILSVRC2012_val_{number:08d}.png", number)
    (tmp_path / "real.json").write_text(json.dumps([[3, 8], [], [4], [9, 11]]))
    found = found_on("imagenet-real", tmp_path, {1: [8], 3: [5, 4], 4: [1, 2, 3, 4, 5, 6, 11]})
    assert found["pictures"] == 3
    assert found["top1"] == pytest.approx(100 / 3)
    assert found["top5"] == pytest.approx(200 / 3)
    assert found["loss"] is None
    picture(tmp_path / "other.png")
    with pytest.raises(UserError, match=r"other\.png.*ILSVRC2012_val_00000001"):
        named_set("imagenet-real", tmp_path, pixels)


def test_the_labels_that_timm_carries_are_reals(tmp_path):
    for number in range(1, 6):  # the first has no label
        picture(tmp_path / f"ILSVRC2012_val_{number:08d}.png")
    images = named_set("imagenet-real", tmp_path, pixels)
    assert images.accepted == [(970, 795), (230, 231), (809,), (516, 850)]
    assert "5 of 50000 pictures" in images.notes[0]


def test_mce_is_the_mean_of_errors_relative_to_alexnets(tmp_path):
    kinds = dict(zip(ALEXNET_ERROR, ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4, strict=True))
    for k, corruption in enumerate(ALEXNET_ERROR):
        for severity in range(1, 6):
            for i in range(2):
                value = 1 + (k + severity + i) % 3
                picture(tmp_path / kinds[corruption] / corruption / str(severity) / SYNSETS[SHARK] / f"{i}.png", value)
    found = found_on("imagenet-c", tmp_path, {1: [SHARK], 2: [SHARK], 3: [5]})
    relative = []
    for k, theirs in enumerate(ALEXNET_ERROR.values()):
        wrong = [sum(1 + (k + s + i) % 3 == 3 for i in range(2)) / 2 for s in range(1, 6)]
        relative.append(np.mean(wrong) / theirs)
    assert found["mce"] == pytest.approx(100 * np.mean(relative))
    assert found["pictures"] == 150
    shutil.rmtree(tmp_path / "weather" / "fog" / "3")
    images = named_set("imagenet-c", tmp_path, pixels)
    assert "1 of the 75" in images.notes[-1]
    assert "fog/3" in images.notes[-1]
    assert mean_corruption_error([True] * len(images.groups), images.groups) is None


def test_alexnet_itself_has_an_mce_of_100():
    """1,000,000 pictures would show it; here their errors are rounded to a thousandth."""
    right, groups = [], []
    for corruption, error in ALEXNET_ERROR.items():
        for severity in range(1, 6):
            right += [i >= round(1000 * error) for i in range(1000)]
            groups += [f"{corruption}/{severity}"] * 1000
    assert mean_corruption_error(right, groups) == pytest.approx(100, abs=0.1)


def test_unreadable_files_count_as_wrong(tmp_path):
    picture(tmp_path / SYNSETS[SHARK] / "a.png", 1)
    (tmp_path / SYNSETS[SHARK] / "b.png").write_bytes(b"no picture")

    def tiny(image: Image.Image) -> torch.Tensor:
        return pixels(image.resize((4, 4)))

    found = evaluate(Says({1: [SHARK], 0: [SHARK]}), named_set("imagenet", tmp_path, tiny)).figures
    assert (found["top1"], found["unreadable"], found["pictures"]) == (50, 1, 2)


def test_the_command_knows_the_sets():
    assert tuple(SETS) == _eval.SETS


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(vitzoo.create_model("nat_micro", num_classes=10).state_dict(), folder / f"{seed}.pt")
    return folder


def test_several_checkpoints_make_one_table(capsys, tmp_path, checkpoints):
    held = DigitImages("val", lambda image: image)
    for i in range(0, 40):
        path = tmp_path / "scans" / str(held.labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        held.picture(i).save(path)
    (checkpoints / "2.pt").write_bytes(b"")
    words = ["--model", "nat_micro", "--num-classes", "10", "--checkpoint", f"{checkpoints}/*.pt"]
    tables = ["--csv", f"{tmp_path}/t.csv", "--markdown", f"{tmp_path}/t.md", "--tables", f"{tmp_path}/classes"]
    assert main(["eval", *words, "--data", str(tmp_path / "scans"), "digits", *tables]) == 1
    ((name, said),) = [line.split(": ", 2)[1:] for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert name.endswith("2.pt")
    assert said
    with open(tmp_path / "t.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(Path(row["model"]).name, row["data"]) for row in rows] == [
        ("0.pt", "scans"), ("0.pt", "digits"), ("1.pt", "scans"), ("1.pt", "digits"), ("2.pt", "")
    ]  # fmt: skip
    assert [row["pictures"] for row in rows] == ["40", "360", "40", "360", ""]
    assert rows[0]["top1"] != rows[2]["top1"]
    assert (tmp_path / "t.md").read_text().splitlines()[0].startswith("| model | data | top-1 % |")
    (table,) = (tmp_path / "classes").glob("*1.pt.scans.classes.csv")
    with open(table) as file:
        found = list(csv.DictReader(file))
    right = sum(int(row["pictures"]) * float(row["accuracy"]) for row in found)
    assert right / 40 == pytest.approx(float(rows[2]["top1"]) / 100, abs=1e-4)


def test_a_sentence_says_all_figures_of_one_model(capsys):
    assert main(["eval", "--model", "nat_micro.digits", "--data", "digits"]) == 0
    said = capsys.readouterr().out
    for part in ("top-1 ", " %, top-5 ", "loss ", "calibration error ", "img/s ", "on 360 pictures"):
        assert part in said, said


def test_a_set_of_imagenet_needs_a_model_of_its_classes(capsys, tmp_path):
    assert main(["eval", "--model", "nat_micro.digits", "--data", str(tmp_path), "--set", "imagenet-r"]) == 1
    assert "1000 classes, and this one has 10" in capsys.readouterr().err
    assert main(["eval", "--model", "nat_micro.digits", "--data", str(tmp_path), "digits", "--set", "imagenet-r"]) == 1
    assert "one folder for each set" in capsys.readouterr().err
