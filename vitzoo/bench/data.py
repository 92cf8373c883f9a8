"""Whether the loader keeps up with the step: pictures a second of each, by the number of loading processes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch.nn import functional as F

import vitzoo
from vitzoo.bench.timing import markdown, seconds
from vitzoo.data import ImageData

__all__ = ["Loading", "folder_of_photographs", "loading", "step_seconds", "table"]


@dataclass(frozen=True)
class Loading:
    """Pictures a second.

    Attributes:
        workers: loading processes; 0: the training process itself, which then cannot load while it trains.
        loader: of the loader alone, spread over the rounds' median.
        step: of a training step alone.
    """

    workers: int
    loader: float
    step: float

    @property
    def waits(self) -> float:
        """Part of the time that training waits for pictures, in 0..1, where loading and training overlap perfectly."""
        if self.workers == 0:
            return (1 / self.loader) / (1 / self.loader + 1 / self.step)
        return max(0.0, 1 - self.loader / self.step)


def folder_of_photographs(root: Path, files: int = 32, links: int = 64, size: tuple[int, int] = (500, 375)) -> Path:
    """Write JPEGs of ImageNet's usual size, each under many names, so that an epoch is long and the disk is not.

    Args:
        root: gets ``train/`` and ``val/`` with two classes.
        files: pictures, of smooth noise.
        links: names of each.
        size: width and height.

    Returns:
        ``root``.
    """
    draw = np.random.RandomState(0)
    for label in ("a", "b"):
        for split, names in (("train", links), ("val", 1)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(files // 2):
                coarse = Image.fromarray(draw.randint(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8))
                coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
                for k in range(1, names):
                    (folder / f"{i}-{k}.jpg").hardlink_to(folder / f"{i}.jpg")
    return root


def _forever(data: ImageData) -> Iterator[Any]:
    loader = data.train_dataloader()
    epoch = 0
    while True:
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
        yield from loader
        epoch += 1


def loader_rate(settings: dict[str, Any], workers: int, pictures: int, rounds: int) -> float:
    """Pictures a second of a training loader: the median over rounds of ``pictures`` each, once it runs evenly.

    Args:
        settings: of :class:`vitzoo.data.ImageData`.
        workers: loading processes.
        pictures: in a round.
        rounds: how many.

    Returns:
        Pictures a second.
    """
    data = ImageData(**{**settings, "num_workers": workers})
    data.setup("fit")
    batches = _forever(data)
    size = data.hparams.batch_size
    for _ in range(max(2, 3 * workers)):  # what each worker has made ahead of time does not count
        next(batches)
    rates = []
    for _ in range(rounds):
        number = max(1, pictures // size)
        begin = time.perf_counter()
        for _ in range(number):
            next(batches)
        rates.append(number * size / (time.perf_counter() - begin))
    return statistics.median(rates)


def step_seconds(name: str, batch: int, size: int, device: torch.device, rounds: int) -> float:
    """Seconds of a training step of a model: forward, backward, AdamW; bf16 autocast on a GPU."""
    model = vitzoo.create_model(name, num_classes=1000).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    for _ in range(2):
        step()
    return statistics.median(seconds(step, device) for _ in range(rounds))


def loading(
    name: str,
    *,
    root: str | None,
    config: str | None,
    batch: int,
    size: int,
    workers: list[int],
    pictures: int,
    rounds: int,
) -> list[Loading]:
    """Measure the loader with each number of workers, and the step once.

    Args:
        name: of the model.
        root: pictures; None: JPEGs of 500 x 375 that are made up.
        config: of train.py, whose ``data`` says how pictures are augmented; None: the defaults.
        batch: pictures in a step.
        size: pixels.
        workers: numbers of loading processes.
        pictures: in a round.
        rounds: how many.

    Returns:
        One for each of ``workers``.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = dict(yaml.safe_load(Path(config).read_text())["data"]) if config is not None else {}
    step = batch / step_seconds(name, batch, size, device, rounds)
    with tempfile.TemporaryDirectory() as folder:
        where = root or str(folder_of_photographs(Path(folder)))
        settings |= {"root": where, "batch_size": batch, "img_size": size}
        return [Loading(number, loader_rate(settings, number, pictures, rounds), step) for number in workers]


def table(results: list[Loading]) -> str:
    """Markdown, with what would be enough."""
    head = ("workers", "loader img/s", "step img/s", "loader / step", "training waits")
    rows = [
        (str(r.workers), f"{r.loader:.0f}", f"{r.step:.0f}", f"{r.loader / r.step:.2f}", f"{100 * r.waits:.0f} %")
        for r in results
    ]
    enough = next((r for r in results if r.workers > 0 and r.loader >= r.step), None)
    end = (
        f"{enough.workers} loading processes are enough."
        if enough
        else "None of these is enough: more processes on more cores, or smaller files."
    )
    return f"{markdown(head, rows)}\n\n{end}"


def as_json(result: Loading) -> dict[str, float]:
    """Fields and what follows from them."""
    return {**asdict(result), "waits": result.waits}
