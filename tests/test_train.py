"""The command line, end to end: what it trains, says and refuses, and that a killed run ends with the same bits."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vitzoo
from tests.data import coco
from tests.data.pictures import ade20k, by_class
from vitzoo.tasks import html

ROOT = Path(__file__).resolve().parents[1]
ALL_CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DENSE = {
    path: task
    for path in ALL_CONFIGS
    if (task := yaml.safe_load(path.read_text()).get("task", "classification")) != "classification"
}
CONFIGS = [path for path in ALL_CONFIGS if path not in DENSE]
QUICK = ["--config", "configs/quickstart.yaml", "--trainer.accelerator", "cpu"]
SHORT = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "4", "--data.batch_size", "16", "--save_every", "1"]


@pytest.fixture
def train(monkeypatch, capsys):
    """Run train.py in this process; returns what it printed, or the message with which it exited."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))

    def run(*arguments):
        import train as script

        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        try:
            script.main()
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return run


@pytest.fixture
def pictures(tmp_path):
    return by_class(tmp_path / "pictures")


def rows(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_everything_in_its_folder_and_ends_with_one_line(train, tmp_path):
    out = tmp_path / "run"
    said = train("fit", *QUICK, *SHORT, "--out", out)
    last = said.strip().splitlines()[-1]
    assert last.startswith("top-1 0.")
    assert "on 360 held-out pictures" in last
    for name in ("best.ckpt", "result.png"):
        assert str(out / name) in last
    assert {p.name for p in out.iterdir()} == {
        "best.ckpt",
        "config.yaml",
        "last.ckpt",
        "metrics.csv",
        "result.png",
        "tensorboard",
        "val_classes.csv",
        "val_confusion.csv",
        "val_figures.json",
        "val_pictures.png",
    }
    found = json.loads((out / "val_figures.json").read_text())
    assert found["figures"]["top1"] == pytest.approx(float(last.split()[1]), abs=1e-4)
    assert found["figures"].keys() == {"top1", "top5", "loss", "ece"}
    assert found["images_per_second"] > 0
    with open(out / "val_classes.csv") as file:
        table = list(csv.DictReader(file))
    assert sum(int(row["pictures"]) for row in table) == found["pictures"] == 360
    right = sum(int(row["pictures"]) * float(row["accuracy"]) for row in table)
    assert right / 360 == pytest.approx(found["figures"]["top1"], abs=1e-5)
    assert Image.open(out / "val_pictures.png").height > 400
    assert [row["epoch"] for row in rows(out)] == ["0", "1"]
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 8

    top1 = float(last.split()[1])
    assert float(train("validate", *QUICK, "--out", out).split()[1].rstrip(",")) == top1
    assert float(train("test", "--config", out / "config.yaml").split()[1].rstrip(",")) == top1

    again = train("fit", *QUICK, *SHORT, "--out", out, "--ckpt_path", "last")  # finished: nothing to do but to say so
    assert again.strip().splitlines()[-1].split()[1] == last.split()[1]
    assert len(rows(out)) == 2

    assert "from a last.ckpt" in train("fit", *QUICK, *SHORT, "--out", out, "--ckpt_path", out / "best.ckpt")

    page = html.report(out, out / "report.html").read_text()
    assert all(f"{found['figures'][key]:.4f}" in page for key in found["figures"])
    assert page.count("data:image/png;base64,") == 3  # of val, of test, the curves
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    assert all(word in page for word in ("Confusion", "mistaken_for", "val_top1", "nat_micro", "max_epochs"))

    longer = train("fit", *QUICK, *SHORT, "--out", out, "--ckpt_path", "last", "--trainer.max_epochs", 3)
    assert "epoch 3/3" in longer
    assert [row["step"] for row in rows(out)] == ["4", "8", "12"]

    said = train("fit", "--config", out / "config.yaml", "--trainer.fast_dev_run", "true")  # the saved config runs again
    assert out.exists()
    said = train("fit", *QUICK, *SHORT, "--out", out, "--trainer.max_epochs", 1)
    assert "moved to" in said
    assert (tmp_path / "run.1" / "last.ckpt").exists()  # an earlier run is never overwritten
    assert len(rows(out)) == 1


def test_own_pictures_train_and_predict(train, pictures, tmp_path):
    (pictures / "train" / "blue" / "broken.jpg").write_bytes(b"no picture")
    use = [
        "--config",
        "configs/finetune/folder.yaml",
        "--data.root",
        pictures,
        "--model.name",
        "nat_micro",
        "--out",
        tmp_path / "run",
    ]
    use += ["--model.pretrained", "false", "--data.num_workers", 0, "--trainer.accelerator", "cpu", "--data.batch_size", 6]
    said = train("fit", *use, "--trainer.max_epochs", 1)
    assert "broken.jpg" in said
    assert "class 'blue'" in said
    with pytest.warns(UserWarning, match="1 of 19 train pictures could not be read"):
        assert "on 6 held-out pictures" in train("fit", *use, "--trainer.max_epochs", 1, "--data.skip_corrupt", "true")
    (pictures / "val" / "odd.png").write_bytes(b"")
    said = train("predict", *use, "--data.predict", pictures / "val", "--data.skip_corrupt", "true")
    assert "7 pictures" in said
    with open(tmp_path / "run" / "predictions.csv") as file:
        found = list(csv.DictReader(file))
    assert {row["class"] for row in found} <= {"blue", "green", "red", ""}
    assert [row["path"].rsplit("/", 1)[-1] for row in found if not row["class"]] == ["odd.png"]
    (pictures / "train" / "red").rename(pictures / "train" / "rot")
    (pictures / "val" / "red").rename(pictures / "val" / "rot")
    assert "'red'" in train("validate", *use)  # the checkpoint's classes are others


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.nmae", "x"], ["no key 'model.nmae'", "'model.name'"]),
        (["--data.batchsize", "3"], ["no key 'data.batchsize'", "'data.batch_size'"]),
        (["--model.name", "nat_mikro"], ["nat_mikro", "nat_micro"]),
        (["--model.kwargs.kernel", "3"], ["kernel", "kernel_size"]),
        (["--data.root", "/nowhere"], ["/nowhere", "no directory", "digits"]),
        (["--data.batch_size", "5000"], ["5000", "1437"]),
        (["--data.batch_size", "15", "--model.mixup", "0.8"], ["15", "odd", "--data.batch_size 16"]),
        (["--model.cooldown_epochs", "25"], ["cooldown_epochs 25", "max_epochs 25"]),
        (["--ckpt_path", "gone.ckpt"], ["gone.ckpt", "does not exist"]),
        (["--ckpt_path", "best"], ["--ckpt_path last"]),
        (["--trainer.accelerator", "gpu"], ["No supported gpu backend", "--trainer.accelerator cpu"]),
        (
            [*SHORT, "--trainer.accumulate_grad_batches", "1", "--model.lr", "1e30", "--model.warmup_epochs", "0"],
            ["not finite in epoch 1, batch 2, after 1 updates", "training picture", "goes on from", "not_finite-0.txt"],
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(train, tmp_path, arguments, words):
    said = train("fit", *QUICK, "--out", tmp_path / "run", *arguments)
    assert said.startswith("error: ")
    assert "\n" not in said
    for word in words:
        assert word in said


def test_a_wrong_key_in_a_file_is_named_with_the_nearest(train, tmp_path):
    text = (ROOT / "configs/quickstart.yaml").read_text().replace("weight_decay:", "wieght_decay:")
    (tmp_path / "wrong.yaml").write_text(text)
    said = train("fit", "--config", tmp_path / "wrong.yaml", "--out", tmp_path / "run")
    assert said == "error: there is no key 'model.wieght_decay'. The nearest is 'model.weight_decay'."


def test_evaluation_without_weights_says_where_they_would_be(train, tmp_path):
    said = train("validate", *QUICK, "--out", tmp_path / "none")
    assert "none/best.ckpt does not exist" in said


def stand_in(model):
    """Arguments that put a tiny model of the same make into the place of a config's, and its name and keywords checked."""
    name, kwargs = model["name"], model.get("kwargs", {})
    reduction = kwargs.get("token_reduction")
    vitzoo.model_info(name, **{key: value for key, value in kwargs.items() if key != "token_reduction"})
    if "distilled" in name:
        tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 32}
        return ["--model.name", "deit_tiny_distilled_patch16_224", "--model.kwargs", json.dumps(tiny)]
    if reduction is not None:  # some predictors know one number of tokens
        size = {"img_size": 32} if reduction["name"] == "sparsifiner" else {}
        return ["--model.name", "vit_micro", "--model.kwargs", json.dumps({"token_reduction": reduction, **size})]
    if kwargs:
        return ["--model.name", "swin_micro", "--model.kwargs", json.dumps({"img_size": 32})]
    return ["--model.name", "nat_micro"]


@pytest.mark.parametrize("config", CONFIGS, ids=[str(path.relative_to(ROOT / "configs").with_suffix("")) for path in CONFIGS])
def test_every_config_runs_two_steps(train, pictures, tmp_path, config):
    text = config.read_text()
    header = text.split("seed_everything:")[0] if "seed_everything:" in text else text.split("\nout:")[0]
    assert text.startswith("# ")
    assert "command" in header
    assert "expect" in header or config.stem in ("folder", "digits")
    assert config.name in header or config.stem == "quickstart"
    settings = yaml.safe_load(text)
    tiny = stand_in(settings["model"])
    if settings["data"].get("root") != "digits":
        tiny += ["--data.root", pictures, "--data.img_size", 32]
    if "dataset" in settings["data"]:
        tiny += ["--data.dataset", "null"]
    if "sizes" in settings["data"]:
        tiny += ["--data.sizes", "[32, 48]"]
    if "teacher" in settings["model"]:
        teacher = vitzoo.create_model("nat_micro", num_classes=3)
        torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
        tiny += ["--model.teacher", "nat_micro", "--model.teacher_weights", tmp_path / "teacher.pt"]
    said = train(
        "fit", "--config", config, *tiny, "--model.pretrained", "false", "--data.batch_size", 4, "--data.num_workers", 0,
        "--trainer.max_epochs", 25, "--trainer.fast_dev_run", 2, "--trainer.precision", "32-true",
        "--trainer.accelerator", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "pictures an update, learning rate" in said
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_every_family_of_imagenet_models_has_a_recipe():
    models = [yaml.safe_load(path.read_text())["model"]["name"] for path in (ROOT / "configs/imagenet").glob("*.yaml")]
    without = {"a2mamba", "moh", "patchconvnet", "pvt", "tap_adl", "vit"}  # their sheets hold no whole recipe, or none yet
    assert {vitzoo.model_info(name).family for name in models} >= set(vitzoo.list_families()) - without


@pytest.mark.parametrize("config", DENSE, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_dense_config_has_a_header_and_keys_that_there_are(train, capsys, config):
    text = config.read_text()
    assert text.startswith("# ")
    assert "command" in text.split("\nseed_everything")[0]
    assert "expect" in text.split("\nseed_everything")[0]
    assert str(config.relative_to(ROOT)) in text
    settings = yaml.safe_load(text)
    vitzoo.model_info(settings["model"]["backbone"], **settings["model"].get("kwargs", {}))
    said = train("fit", "--config", config, "--print_config")
    assert said in ("0", "None"), said


ONE_STEP = {
    "detection/quickstart": ["--data.train_scenes", 2, "--data.val_scenes", 2],
    "segmentation/quickstart": ["--data.train_scenes", 2, "--data.val_scenes", 2],
    "detection/maskrcnn_swin_tiny_1x": ["--model.kwargs.depths", "[1,1,1,1]"],
    "segmentation/upernet_swin_tiny": ["--model.kwargs.depths", "[1,1,1,1]", "--model.channels", 32],
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_dense_recipes_run_a_step(train, tmp_path, name):
    task = name.split("/")[0]
    stand_in = []
    if "quickstart" not in name:
        stand_in = ["--data.root", coco.write(tmp_path / "data") if task == "detection" else ade20k(tmp_path / "data")]
        stand_in += ["--model.pretrained", "false", "--trainer.sync_batchnorm", "false"]
        small = {"detection": ["--model.min_size", "[64]", "--model.max_size", 96], "segmentation": ["--data.crop", 64]}
        stand_in += [*small[task], *([] if task == "detection" else ["--data.size", 64])]
    said = train(
        "fit", "--config", ROOT / f"configs/{name}.yaml", *stand_in, *ONE_STEP[name], "--data.batch_size", 2,
        "--data.num_workers", 0, "--trainer.fast_dev_run", 1, "--trainer.precision", "32-true",
        "--trainer.accelerator", "cpu", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "pictures an update, learning rate" in said


@pytest.mark.parametrize(("task", "figure"), [("detection", "box AP"), ("segmentation", "mIoU")])
def test_a_dense_run_leaves_its_figure_and_a_picture(train, pictures, tmp_path, task, figure):
    use = [
        "--config",
        f"configs/{task}/quickstart.yaml",
        "--data.train_scenes",
        8,
        "--data.val_scenes",
        3,
        "--out",
        tmp_path / "run",
    ]
    use += ["--trainer.accelerator", "cpu", "--data.scene_size", 64, "--data.batch_size", 4]
    if task == "segmentation":
        use += ["--data.crop", 64]
    said = train("fit", *use, "--trainer.max_epochs", 2, "--trainer.check_val_every_n_epoch", 1)
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"{figure} 0.")
    assert "on 3 held-out pictures" in last
    assert np.asarray(Image.open(tmp_path / "run/result.png").convert("L")).std() > 5
    with open(tmp_path / "run/val_classes.csv") as file:
        assert [row["class"] for row in csv.DictReader(file)][-4:] == ["disc", "box", "triangle", "star"]
    assert Image.open(tmp_path / "run/val_pictures.png").height > 150
    page = html.report(tmp_path / "run", tmp_path / "page.html").read_text()
    assert figure in page
    assert page.count("data:image/png;base64,") == 2
    assert all(word in page for word in ("triangle", "train_loss", "train_scenes", "3 held-out pictures"))
    columns = rows(tmp_path / "run")[-1]
    assert columns["val_box_ap" if task == "detection" else "val_miou"] != ""
    again = train("validate", *use)
    assert again.split(",")[0] == last.split(" on ")[0]
    said = train("predict", *use, "--data.predict", pictures / "val")
    assert "6 pictures" in said
    assert len(list((tmp_path / "run/predictions").iterdir())) == (6 if task == "detection" else 12)
    assert (
        "the detector fcos and this run has retinanet" in train("validate", *use, "--model.kind", "retinanet")
        if task == "detection"
        else True
    )
    longer = train("fit", *use, "--trainer.max_epochs", 3, "--ckpt_path", "last", "--trainer.check_val_every_n_epoch", 1)
    assert "epoch 3/3" in longer


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("detection", ["--task", "detektion"], ["no task 'detektion'", "'detection'"]),
        ("detection", ["--model.bakcbone", "x"], ["no key 'model.bakcbone'", "'model.backbone'"]),
        ("detection", ["--model.backbone", "nat_mikro"], ["nat_micro"]),
        ("detection", ["--model.kind", "fcoss"], ["fcoss", "'fcos'"]),
        ("detection", ["--model.detector_kwargs.nms_tresh", "0.5"], ["nms_tresh", "nms_thresh"]),
        ("detection", ["--data.root", "/nowhere"], ["/nowhere", "no directory"]),
        ("segmentation", ["--model.class_weights", "[1, 2]"], ["2 numbers", "5 classes"]),
        ("segmentation", ["--model.inference", "part"], ["'part'", "'whole' or 'slide'"]),
        ("segmentation", ["--model.kind", "unett"], ["'unet'"]),
    ],
)
def test_what_is_wrong_in_a_dense_run_is_said_in_one_sentence(train, tmp_path, task, arguments, words):
    use = [
        "--config",
        f"configs/{task}/quickstart.yaml",
        "--data.train_scenes",
        2,
        "--data.val_scenes",
        1,
        "--data.batch_size",
        2,
    ]
    said = train("fit", *use, "--out", tmp_path / "run", *arguments)
    assert said.startswith("error: ")
    assert "\n" not in said
    for word in words:
        assert word in said


def test_the_papers_rate_is_scaled_as_the_config_says(train, pictures, tmp_path):
    from vitzoo.tasks.optim import scaled

    swin = yaml.safe_load((ROOT / "configs/imagenet/swin_tiny.yaml").read_text())
    batch = swin["data"]["batch_size"]
    assert [scaled(swin["model"][key], batch, swin["model"]["lr_batch"]) for key in ("lr", "warmup_lr", "min_lr")] == [
        1e-3, 1e-6, 1e-5
    ]  # fmt: skip


@pytest.mark.parametrize("given", [[], ["--model.name", "swin_micro"], ["--out", "elsewhere"]], ids=["nothing", "model", "out"])
def test_options_alone_change_the_quick_start(train, monkeypatch, given):
    from vitzoo.tasks import cli

    monkeypatch.setattr(cli, "Command", lambda: print(*sys.argv[1:]))
    assert train(*given).split() == ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), *given]


def test_train_py_is_short():
    assert len((ROOT / "train.py").read_text().splitlines()) < 60


def test_a_killed_run_ends_with_the_same_bits_and_rows(tmp_path):
    command = [sys.executable, "tests/kill_and_resume.py", str(tmp_path), "--kills", "2", "--writing", "2", "--term", "1"]
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.strip().splitlines()[-1])
    assert (found["kills"], found["half_written"], found["stopped"]) == (2, 2, 1)
    assert found["differences"] == []
    assert found["rows_equal"]
    assert (found["updates"], found["rows"]) == (20, 4)
