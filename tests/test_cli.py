"""The command `vitzoo`: what it prints, how long its quick part takes, what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vitzoo
from vitzoo.models import index
from vitzoo.models._registry import checkpoints_of
from vitzoo_cli import COMMANDS, _completion, _index, _models, main, parser_of

ROOT = Path(__file__).resolve().parent.parent


def run(capsys, *words: str) -> str:
    assert main(words) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def fail(capsys, *words: str) -> str:
    """The sentence that a command line ends with."""
    try:
        status = main(words)
    except SystemExit as leave:
        status = leave.code
    assert status in {1, 2}
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: "), said
    assert len(said.splitlines()) == 1, said
    return said


@pytest.fixture(scope="module")
def digit(tmp_path_factory) -> Path:
    """A picture file of a held-out handwritten digit, a two."""
    from vitzoo.data.images import DigitImages

    digits = DigitImages("val", lambda picture: picture)
    path = tmp_path_factory.mktemp("pictures") / "two.png"
    digits.picture(digits.labels.index(2)).save(path)
    return path


# -- what answers at once ---------------------------------------------------------------------------------------------


def test_list_help_and_completion_import_no_torch():
    code = """
import sys, time
from vitzoo_cli import main, parser_of, COMMANDS
assert main(["list"]) == 0 and time.process_time() < 2
assert main(["list", "nat*"]) == 0 and main(["completion", "bash"]) == 0 and main(["--help"]) == 0
[parser_of(name).format_help() for name in COMMANDS]
foreign = {"torch", "timm", "vitzoo", "numpy"} & set(sys.modules)
assert not foreign, foreign
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_index_names_every_model_and_checkpoint():
    rewrite = "Run: python -m vitzoo.models.index"
    known = {model["name"]: model for model in _index.read()}
    assert sorted(known) == vitzoo.list_models(), rewrite
    for name, model in known.items():
        assert model["weights"] == index.published(name), f"{name}: {rewrite}"


@pytest.mark.parametrize("name", ["nat_tiny", "swin_micro", "cswin_micro", "vit_tiny_patch16_224"])
def test_the_index_says_what_the_model_counts(name):
    assert index.entry(name) == _index.named(name), "Run: python -m vitzoo.models.index --fresh"


def test_list_filters_and_sorts(capsys):
    rows = json.loads(run(capsys, "list", "swin*", "nat*", "--max-params", "60", "--sort", "top1", "--json"))
    names = [row["name"] for row in rows]
    assert all(name.startswith(("swin", "nat")) for name in names)
    figures = [row["top1"] for row in rows if row["top1"] is not None]
    assert figures == sorted(figures, reverse=True)
    assert len(figures) > 5
    assert all(row["params"] <= 60e6 for row in rows)
    assert "nat_micro" in names  # has no figure, so it comes after those that have
    tags = json.loads(run(capsys, "list", "swin*", "--pretrained", "--license", "mit", "--json"))
    assert "swin_tiny_patch4_window7_224.ms_in22k" in {row["name"] for row in tags}
    assert "nat_tiny" in run(capsys, "list", "--family", "nat")


def test_what_is_mistyped_is_answered_with_the_nearest(capsys):
    assert "Did you mean 'list'" in fail(capsys, "lst")
    assert "nat_tiny" in fail(capsys, "info", "nat_tyni")
    assert "--pretrained" in fail(capsys, "list", "--pretraind")
    assert "nat" in fail(capsys, "list", "--family", "natt")
    assert "No model matches" in fail(capsys, "list", "qqq*")


def test_completion_knows_commands_options_choices_and_models():
    assert _completion.complete([], "ex") == ["export"]
    assert "--features" in _completion.complete(["export"], "--fe")
    assert _completion.complete(["list", "--sort"], "t") == ["top1"]
    assert "nat_micro" in _completion.complete(["predict", "x.png", "--model"], "nat_m")
    assert "rollout" in _completion.complete(["visualize"], "ro")
    assert all(parser_of(name).epilog.startswith("examples:") for name in COMMANDS)


# -- one model --------------------------------------------------------------------------------------------------------


def test_info_counts_every_parameter_and_multiply_add(capsys):
    found = json.loads(run(capsys, "info", "swin_micro", "--json"))
    assert sum(part["params"] for part in found["parts"]) == vitzoo.model_info("swin_micro").params
    assert sum(part["gmacs"] for part in found["parts"]) == pytest.approx(vitzoo.model_info("swin_micro").gmacs, rel=1e-3)
    patterns = [a["pattern"] for part in found["parts"] for a in part["attention"]]
    assert "window(4, shift=2, edge='cover')" in patterns


def test_info_draws_who_sees_whom(capsys, tmp_path):
    said = run(capsys, "info", "nat_micro", "--png", str(tmp_path / "nat.png"))
    assert "neighborhood" in said
    assert "@" in said
    assert Image.open(tmp_path / "nat.png").width > 100


def test_a_pattern_is_drawn_and_printed(capsys, tmp_path):
    out = tmp_path / "pattern.png"
    call = "neighborhood(3, dilation=2)"
    said = run(capsys, "visualize", "pattern", "--pattern", call, "--size", "6x7", "--query", "0x3", "--out", str(out))
    assert said.splitlines()[:6] == [
        ". # . @ . # .",
        ". . . . . . .",
        ". # . # . # .",
        ". . . . . . .",
        ". # . # . # .",
        ". . . . . . .",
    ]
    assert Image.open(out).size == (7 * 14 + 1, 6 * 14 + 1)
    assert "no pattern" in fail(capsys, "visualize", "pattern", "--pattern", "__import__('os')", "--out", str(out))
    assert "needs" in fail(capsys, "visualize", "pattern", "--pattern", "neighborhood(9)", "--size", "5", "--out", str(out))


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("attention", "--model", "swin_micro", "--random", "--layer", "2", "--head", "1"), ("attention_heat", 2, 1)),
        (("attention", "--model", "nat_micro.digits"), ("attention_heat", -1, None)),
        (("rollout", "--model", "nat_micro.digits"), ("rollout",)),
        (("rollout", "--model", "nat_micro.digits", "--target", "2"), ("relevance", 2)),
        (("gradcam", "--model", "nat_micro.digits", "--target", "5"), ("gradcam", 5)),
        (("attention", "--model", "test_vit", "--random"), ("attention_heat", -1, None)),  # one of timm's
        (("gradcam", "--model", "test_resnet", "--random"), ("gradcam", None)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_what_a_model_attends_to_is_drawn_over_the_photograph(capsys, tmp_path, digit, words, asked):
    out = tmp_path / "seen.png"
    torch.manual_seed(0)
    assert run(capsys, "visualize", *words, "--image", str(digit), "--out", str(out)) == f"{words[0]} in {out}\n"
    torch.manual_seed(0)
    args = parser_of("visualize").parse_args([*words, "--image", str(digit), "--out", str(out)])
    model, image, config = _models.pictured(args)
    model = model if words[0] == "gradcam" else vitzoo.accelerate(model)
    name, *options = asked
    heat = getattr(vitzoo.explain, name)(model, image[None], *options)
    expected = vitzoo.explain.draw(image, heat[0], mean=config["mean"], std=config["std"])
    assert heat.std() > 0
    assert Image.open(out).tobytes() == expected.tobytes()


def test_what_cannot_be_drawn_is_said_in_a_sentence(capsys, tmp_path, digit):
    def said(kind: str, *words: str, model: str = "nat_micro.digits", out: str = "x.png") -> str:
        return fail(capsys, "visualize", kind, "--model", model, "--image", str(digit), "--out", str(tmp_path / out), *words)

    assert "attends in 5 layers, there is no layer 5" in said("attention", "--layer", "5")
    assert "has 4 heads, there is no head 4" in said("attention", "--head", "4")
    assert "target is one of 10 classes" in said("rollout", "--target", "10")
    assert "target is one of 10 classes" in said("gradcam", "--target", "-1")
    assert "called no softmax attention" in said("attention", "--random", model="van_micro")
    assert "Did you mean" in said("attention", model="nat_tyni")
    assert "There is no folder" in said("rollout", out="nowhere/x.png")
    assert "takes --model NAME and --image FILE" in fail(capsys, "visualize", "rollout", "--out", "x.png")
    assert list(tmp_path.iterdir()) == []


# -- weights that are really there ------------------------------------------------------------------------------------


def test_a_shipped_weight_reads_a_digit_offline(capsys, digit):
    first = run(capsys, "predict", str(digit), "--model", "nat_micro.digits").splitlines()
    assert len(first) == 5
    assert first[0].split()[2] == "2"
    rows = json.loads(run(capsys, "predict", str(digit), "--model", "nat_micro.digits", "--top", "1", "--json"))
    assert rows[0]["classes"][0]["name"] == "2"


def test_a_photograph_is_classified_with_a_shipped_weight_and_no_network(tmp_path):
    photograph = Image.effect_noise((413, 275), 60).convert("RGB")
    photograph.save(tmp_path / "photo.jpg")
    code = """
import socket, sys
def refuse(*a, **k):
    raise AssertionError("reached for the network")
socket.socket.connect = socket.getaddrinfo = refuse
from vitzoo_cli import main
sys.exit(main(["predict", "photo.jpg", "--model", "nat_micro.digits", "--top", "3", "--json"]))
"""
    empty = {**os.environ, "TORCH_HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=empty, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)[0]["classes"]) == 3
    assert not (tmp_path / "home").exists()


def test_a_file_that_is_not_these_weights_is_refused_in_a_sentence(capsys, tmp_path):
    shipped = ROOT / "weights" / "nat_micro.digits.safetensors"
    out = str(tmp_path / "out.safetensors")
    cut, page = tmp_path / "cut.safetensors", tmp_path / "page.pth"
    cut.write_bytes(shipped.read_bytes()[:-1000])
    page.write_text("<html>Quota exceeded</html>")
    torch.save({"model": {}, "args": torch.nn.Identity()}, tmp_path / "object.pth")
    for name, file, said in (
        ("swin_micro", shipped, "does not fit Swin"),
        ("nat_micro", cut, "cannot be read as safetensors"),
        ("nat_micro", page, "page.pth"),
        ("nat_micro", tmp_path / "object.pth", "could run code"),
        ("nat_micro", tmp_path / "nowhere.pth", "There is no checkpoint at"),
    ):
        assert said in fail(capsys, "convert", name, str(file), "--out", out)
    assert not (tmp_path / "out.safetensors").exists()


SHIPPED = [row for name in vitzoo.list_models("*_micro") for row in checkpoints_of(name).values() if row.file]


def test_there_are_shipped_weights_and_they_are_small():
    files = list((ROOT / "weights").glob("*.safetensors"))
    assert {path.name for path in files} == {row.file for row in SHIPPED} != set()
    assert sum(path.stat().st_size for path in files) < 3e6


@pytest.mark.parametrize("row", SHIPPED, ids=lambda row: row.name)
def test_a_shipped_weight_reproduces_its_figure(capsys, row):
    result = json.loads(run(capsys, "eval", "--model", row.name, "--data", "digits", "--json"))
    assert round(result["top1"], 2) == row.top1
    assert row.params == sum(p.numel() for p in vitzoo.create_model(row.name).parameters())
    assert row.command
    assert row.commit


def test_what_is_missing_is_said_in_a_sentence(capsys, tmp_path, digit):
    assert "no picture" in fail(capsys, "predict", str(tmp_path / "nowhere.png"), "--model", "nat_micro.digits")
    assert "Which model" in fail(capsys, "predict", str(digit))
    (tmp_path / "text.png").write_text("not a picture")
    assert "text.png" in fail(capsys, "predict", str(tmp_path / "text.png"), "--model", "nat_micro.digits")
    assert "Google Drive" in fail(capsys, "predict", str(digit), "--model", "dat_tiny")
    assert "--accept-license" in fail(capsys, "predict", str(digit), "--model", "vit_base_patch16_224.mae")
    assert "best.ckpt" in fail(capsys, "predict", str(digit), "--task", "detect")
    assert ".onnx" in fail(capsys, "export", "nat_micro", "--out", str(tmp_path / "model.pth"))


def test_convert_takes_a_run_and_refuses_other_classes(capsys, tmp_path):
    theirs, ours = ROOT / "weights" / "nat_micro.digits.safetensors", tmp_path / "ours.safetensors"
    said = run(capsys, "convert", "nat_micro", str(theirs), "--num-classes", "10", "--out", str(ours))
    assert "316,116" in said
    assert ours.read_bytes() == theirs.read_bytes()
    said = fail(capsys, "convert", "nat_micro", str(theirs), "--out", str(tmp_path / "wrong.safetensors"))
    assert "(10, 128), not (1000, 128)" in said
    assert not (tmp_path / "wrong.safetensors").exists()
    assert "a JSON object" in fail(capsys, "convert", "nat_micro", str(theirs), "--options", "[1]")
