"""What ``train.py`` costs and whether it learns what timm's does.

A step of our loop (logger, history, checkpoints and progress bar on) is timed against a bare PyTorch loop over the same loader,
model, loss, optimiser, schedule and clipping: whole windows of steps, interleaved, so that what happens now and then counts.
Accuracy is compared with that of timm's own ``train.py``: the same model, digits and recipe, over several seeds.
"""

from __future__ import annotations

import csv
import math
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from vitzoo.bench.timing import markdown
from vitzoo.data import DigitImages, ImageData
from vitzoo.tasks import Classification
from vitzoo.tasks.checkpointing import AtomicCheckpointIO, Checkpoints
from vitzoo.tasks.cli import quiet
from vitzoo.tasks.history import History
from vitzoo.tasks.progress import Bar

__all__ = ["Step", "digits_as_folders", "measure_step", "parity", "parity_table", "table"]

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs/quickstart.yaml"
SKIPPED = 5  # steps at the start of a window


@dataclass(frozen=True)
class Step:
    """Milliseconds of a step, medians over the rounds.

    Attributes:
        batch: pictures.
        bare: of a bare loop.
        ours: of ``train.py``'s.
        bare_cpu: processor time of the same steps, which other work on the machine disturbs less.
        ours_cpu: likewise.
    """

    batch: int
    bare: float
    ours: float
    bare_cpu: float
    ours_cpu: float


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(begin: tuple[float, float], steps: int) -> tuple[float, float]:
    """Milliseconds a step, by the clock and of the processor."""
    now = _clocks()
    return 1e3 * (now[0] - begin[0]) / steps, 1e3 * (now[1] - begin[1]) / steps


class _Window(Callback):
    """The time from the first counted step to the end of the last."""

    found = (math.nan, math.nan)

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == SKIPPED:
            self.begin = _clocks()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == trainer.num_training_batches - 1:
            if module.device.type == "cuda":
                torch.cuda.synchronize()
            self.found = _since(self.begin, batch_idx + 1 - SKIPPED)


def _parts(batch: int) -> tuple[Classification, ImageData]:
    recipe = yaml.safe_load(RECIPE.read_text())
    torch.manual_seed(0)
    data = ImageData(**{**recipe["data"], "batch_size": batch})
    return Classification(num_classes=10, **recipe["model"]), data


def _ours(batch: int, steps: int, out: str) -> tuple[float, float]:
    """Milliseconds of a step of our loop, everything on; written into a folder of its own."""
    task, data = _parts(batch)
    bar, window = Bar(), _Window()
    with open(os.devnull, "w") as nowhere:
        bar._console_kwargs = {"force_terminal": True, "file": nowhere}
        callbacks = [History(out, task.CURVES), bar, Checkpoints(out), window]
        trainer = Trainer(
            max_epochs=1, limit_train_batches=steps, limit_val_batches=0, num_sanity_val_steps=0, default_root_dir=out,
            callbacks=callbacks, plugins=[AtomicCheckpointIO()], gradient_clip_val=1.0, log_every_n_steps=20, devices=1,
            accelerator="auto", use_distributed_sampler=False, enable_model_summary=False,
            logger=TensorBoardLogger(out, name="", version="tensorboard", default_hp_metric=False),
        )  # fmt: skip
        trainer.fit(task, datamodule=data)
    return window.found


def _bare(batch: int, steps: int) -> tuple[float, float]:
    """Milliseconds of a step of a loop that does the same and nothing else."""
    task, data = _parts(batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data.setup("fit")
    model = task.model.to(device).train()
    optimizer = task.make_optimizer(4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    begin = _clocks()
    for number, (images, labels) in zip(range(steps), data.train_dataloader(), strict=False):
        if number == SKIPPED:
            begin = _clocks()
        loss = task.loss(model(images.to(device)), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return _since(begin, steps - SKIPPED)


def measure_step(batch: int, rounds: int, steps: int) -> Step:
    """Both loops, in turn.

    Args:
        batch: pictures in a step; an epoch of digits must have ``steps`` of them.
        rounds: windows of each.
        steps: in a window, the first few not counted.

    Returns:
        Medians.
    """
    quiet()
    steps = min(steps, 1437 // batch)
    bare: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        with tempfile.TemporaryDirectory() as out:
            turns = [lambda: bare.append(_bare(batch, steps)), lambda: ours.append(_ours(batch, steps, out))]
            for turn in turns if number % 2 else turns[::-1]:
                turn()
    wall_bare, cpu_bare, wall_ours, cpu_ours = (
        statistics.median(values) for windows in (bare, ours) for values in zip(*windows[1:], strict=True)
    )  # the first round warms up
    return Step(batch, wall_bare, wall_ours, cpu_bare, cpu_ours)


def table(results: list[Step]) -> str:
    """Markdown."""
    rows = [
        (str(r.batch), f"{r.bare:.1f}", f"{r.ours:.1f}", f"{r.ours / r.bare:.3f}", f"{r.ours_cpu / r.bare_cpu:.3f}")
        for r in results
    ]
    return markdown(("batch", "bare loop ms", "train.py ms", "train.py / bare", "in processor time"), rows)


def digits_as_folders(root: Path) -> Path:
    """Write the embedded digits as the folders that timm's readers know: ``train/<digit>`` and ``validation/<digit>``."""
    for split, name in (("train", "train"), ("val", "validation")):
        digits = DigitImages(split, lambda picture: picture)
        for number, label in enumerate(digits.labels):
            folder = root / name / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            digits.picture(number).save(folder / f"{number}.png")
    return root


# One recipe in both languages: quickstart's, with the augmentation that both have
OURS = {
    "model.smoothing": 0.1, "model.lr": 4e-3, "model.weight_decay": 0.05, "model.warmup_epochs": 2, "model.warmup_lr": 1e-5,
    "model.min_lr": 1e-5, "data.batch_size": 64, "data.img_size": 32, "data.crop_pct": 1.0, "data.affine": "false",
    "data.scale": "[0.6, 1.0]", "data.ratio": "[0.8, 1.25]", "data.hflip": 0.0, "data.color_jitter": "null",
    "data.train_interpolation": "bicubic", "data.interpolation": "bicubic", "data.num_workers": 0,
    "trainer.gradient_clip_val": 1.0, "trainer.accelerator": "cpu",
}  # fmt: skip
TIMM = [
    "--opt", "adamw", "--lr", "4e-3", "--weight-decay", "0.05", "--sched", "cosine", "--sched-on-updates", "--warmup-epochs",
    "2", "--warmup-lr", "1e-5", "--min-lr", "1e-5", "--smoothing", "0.1", "--batch-size", "64", "--num-classes", "10",
    "--img-size", "32", "--crop-pct", "1.0", "--scale", "0.6", "1.0", "--ratio", "0.8", "1.25", "--hflip", "0",
    "--color-jitter", "0", "--train-interpolation", "bicubic", "--interpolation", "bicubic", "--workers", "0", "--clip-grad",
    "1.0", "--device", "cpu", "--cooldown-epochs", "0", "--log-interval", "1000",
]  # fmt: skip


def parity(timm_train: Path, seeds: list[int], epochs: int, model: str = "nat_micro") -> dict[str, list[float]]:
    """Last top-1, in percent, of timm's script and of ours for each seed, both started as a user would.

    Args:
        timm_train: timm's ``train.py``, of the version that is installed (it is not part of the package).
        seeds: of both.
        epochs: of each run.
        model: of the zoo.

    Returns:
        For "timm" and "ours" a figure a seed.
    """
    found: dict[str, list[float]] = {"timm": [], "ours": []}
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        data = digits_as_folders(Path(folder) / "digits")
        for seed in seeds:
            theirs = [
                sys.executable, "-m", "vitzoo.bench.training", str(timm_train), "--data-dir", str(data), "--model", model,
                *TIMM, "--epochs", str(epochs), "--seed", str(seed), "--output", folder, "--experiment", f"timm{seed}",
            ]  # fmt: skip
            mine = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(RECIPE), "--model.name", model]
            for key, value in {**OURS, "trainer.max_epochs": epochs, "seed_everything": seed}.items():
                mine += [f"--{key}", str(value)]
            mine += ["--data.root", str(data), "--out", f"{folder}/ours{seed}"]
            for name, command in (("timm", theirs), ("ours", mine)):
                print(f"seed {seed}, {name} ...", file=sys.stderr, flush=True)
                done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
            found["timm"].append(float(_last(Path(folder) / f"timm{seed}/summary.csv", "eval_top1")))
            found["ours"].append(100 * float(_last(Path(folder) / f"ours{seed}/metrics.csv", "val_top1")))
    return found


def _last(path: Path, key: str) -> str:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))[-1][key]


def parity_table(found: dict[str, list[float]]) -> str:
    """Markdown: each seed, the means, and the difference beside its standard error."""
    rows = [
        (name, *(f"{value:.2f}" for value in values), f"{statistics.mean(values):.2f}", f"{statistics.pstdev(values):.2f}")
        for name, values in found.items()
    ]
    seeds = len(found["ours"])
    head = ("top-1 %", *(f"seed {i}" for i in range(seeds)), "mean", "deviation")
    apart = statistics.mean(found["ours"]) - statistics.mean(found["timm"])
    noise = math.sqrt(sum(statistics.variance(values) / seeds for values in found.values())) if seeds > 1 else math.nan
    return f"{markdown(head, rows)}\n\nours - timm: {apart:+.2f}, standard error of the difference {noise:.2f}"


if __name__ == "__main__":  # run timm's script with the zoo's models in timm's registry
    import vitzoo  # noqa: F401

    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
