"""The command line of ``train.py`` for every task: Lightning's, flat YAML, one folder a run, errors in one sentence."""

from __future__ import annotations

import difflib
import json
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from vitzoo.data import DetectionData, ImageData, SegmentationData, UserError
from vitzoo.data.errors import within
from vitzoo.tasks.checkpointing import AtomicCheckpointIO, Checkpoints
from vitzoo.tasks.classification import Classification
from vitzoo.tasks.detection import Detection
from vitzoo.tasks.figures import write_json
from vitzoo.tasks.history import History
from vitzoo.tasks.optim import scaled
from vitzoo.tasks.progress import Bar, Lines, Throughput, say
from vitzoo.tasks.segmentation import Segmentation

__all__ = ["TASKS", "Command", "quiet", "task_of"]

TASKS: dict[str, tuple[Any, Any]] = {
    "classification": (Classification, ImageData),
    "detection": (Detection, DetectionData),
    "segmentation": (Segmentation, SegmentationData),
}


def task_of(arguments: list[str]) -> str:
    """The task that a command line asks for: its ``--task``, else the ``task:`` of its config, else classification.

    Looked up before the parser is made, because the task decides which keys there are.

    Args:
        arguments: of the command line, without the program's name.

    Returns:
        A key of :data:`TASKS`.

    Raises:
        UserError: Another task, or a config that is no YAML.
    """
    named = "classification"
    for key in ("--config", "-c", "--task"):
        for i, argument in enumerate(arguments):
            value = argument.partition("=")[2] if argument.startswith(f"{key}=") else None
            if argument == key and i + 1 < len(arguments):
                value = arguments[i + 1]
            if value is not None and key == "--task":
                named = value
            elif value is not None and Path(value).is_file():
                try:
                    content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
                except (yaml.YAMLError, UnicodeDecodeError) as error:
                    raise UserError(f"{value} is no YAML: {' '.join(str(error).split())}") from error
                _is_config(value, content)
                named = content.get("task", named)
    if named not in TASKS:
        near = difflib.get_close_matches(str(named), TASKS, n=1)
        hint = f" The nearest is {near[0]!r}." if near else ""
        raise UserError(f"There is no task {named!r}; there are {', '.join(TASKS)}.{hint}")
    return named


def _is_config(path: str, content: Any) -> None:
    """Raise UserError where a YAML file holds no keys, or refers to itself."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no config: that is a file of keys such as model.name, as those in configs/ are.")
    try:
        json.dumps(content, default=str)
    except ValueError as error:
        raise UserError(f"{path} is no config: a part of it refers to itself.") from error


def quiet() -> None:
    """Leave out what confuses a newcomer: tips for paid services, and warnings about what this package handles."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for text in (
        ".*LeafSpec.*",
        ".*treespec.*",
        ".*is smaller than the logging interval.*",
        ".*does not have many workers.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*recommended to use .*sync_dist=True.*",
        ".*exists and is not empty.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*returned a view tensor.*",  # nothing changes logits in place
        ".*lr_scheduler.step.*before .*optimizer.step.*",
    ):
        warnings.filterwarnings("ignore", text)


class _Parser(LightningArgumentParser):
    """Answers a wrong key with the nearest right one, in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})  # a key that is nearly one is a mistake

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split())
        keys = re.findall(r"does not accept (?:option|nested key) '([\w.\-]+)'|--([\w.]+)|[Kk]ey '([\w.]+)'", text)
        known = [action.dest for parser in self._family() for action in parser._actions]
        for key in (next(filter(None, groups)) for groups in keys):
            plain = key.removeprefix("fit.").removeprefix("validate.").removeprefix("test.").removeprefix("predict.")
            near = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
            if plain not in known:
                hint = f" The nearest is {near[0]!r}." if near else ""
                sys.exit(f"error: there is no key {plain!r}.{hint}")
        sys.exit(f"error: {text}")

    def _family(self) -> list[Any]:
        subcommands = getattr(self, "_subcommands_action", None)
        return [self, *(subcommands._name_parser_map.values() if subcommands else [])]


class _SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder when training starts; it runs again as a new run."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        path = Path(self.config.out) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        again = self.config.clone()
        again.ckpt_path = None
        self.parser.save(again, path, overwrite=True, multifile=False)


def _needs_masks(kind: str) -> bool:
    return "mask" in kind


class Command(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for one of :data:`TASKS`, which the config names.

    All of a run lies in the folder ``out``: ``config.yaml``, ``last.ckpt``, ``best.ckpt``, ``metrics.csv``,
    ``tensorboard/``, ``result.png``, the predictions. ``--ckpt_path last`` goes on with a run that was stopped, or
    begins it where there is none; without it an earlier run in the folder is moved aside, never overwritten.
    """

    def __init__(self) -> None:
        self.task = task_of(sys.argv[1:])
        model, data = TASKS[self.task]
        self.figure, self.figure_name = next(iter(model.FIGURES.items()))
        super().__init__(
            model,
            data,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"num_sanity_val_steps": 0, "use_distributed_sampler": False, "log_every_n_steps": 20},
            seed_everything_default=0,
            parser_class=_Parser,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without the switches that are decided here."""
        ours = {"verbose", "weights_only", "return_predictions"}
        return {name: skipped | ours for name, skipped in LightningCLI.subcommands().items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``out`` and ``save_every``; the data decides the number of classes, the run's seed that of the data."""
        parser.add_argument("--out", type=str, default="runs/run", help="Folder of the run.")
        parser.add_argument("--save_every", type=int, default=200, help="Updates between two last.ckpt.")
        parser.add_argument("--task", type=str, default=self.task, help=f"{', '.join(TASKS)}.")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        if self.task == "detection":
            parser.link_arguments("model.kind", "data.masks", compute_fn=_needs_masks)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyperparameters overrule the command line."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint that ``ckpt_path`` means."""
        config = self.config[self.subcommand]
        within("save_every", config.save_every, 1)
        within("trainer.gradient_clip_val", config.trainer.gradient_clip_val, 0)
        given, out = config.ckpt_path, Path(config.out)
        self.goes_on = given is not None
        path = {"last": out / "last.ckpt", "best": out / "best.ckpt"}.get(str(given), given)
        if self.subcommand == "fit":
            if given == "best":
                raise UserError("Training goes on from the last checkpoint: --ckpt_path last.")
            if given == "last" and not path.exists():
                say(f"{path} is not there yet: a new run begins.")
                path = None
        elif given is None:
            path = out / "best.ckpt"
            if not path.exists():
                path = None
                if not config.model.pretrained:
                    raise UserError(
                        f"There are no weights to {self.subcommand}: {out / 'best.ckpt'} does not exist. Train first, or "
                        "give --ckpt_path FILE, --out FOLDER or --model.pretrained true."
                    )
        if path is not None and not Path(path).is_file():
            raise UserError(f"--ckpt_path {given} means {path}, which does not exist.")
        config.ckpt_path = None if path is None else str(path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer with this run's folder, checkpoints, history, bar and loggers."""
        config = self.config_init[self.subcommand]
        out, trainer = config.out, config.trainer
        model = TASKS[self.task][0]
        self.history = History(out, model.CURVES)
        self.checkpoints = Checkpoints(out, every=config.save_every, monitor=f"val/{self.figure}")
        self.predictions = model.predictions(out)
        self.throughput = Throughput()
        callbacks = [*(trainer.callbacks or []), self.history, self.predictions, self.throughput]
        bar = sys.stdout.isatty() and trainer.enable_progress_bar is not False
        callbacks.append(Bar() if bar else Lines(self.history))
        if trainer.enable_checkpointing is not False:
            callbacks.append(self.checkpoints)
        if trainer.logger is None and self.subcommand == "fit":
            kwargs["logger"] = TensorBoardLogger(out, name="", version="tensorboard", default_hp_metric=False)
        elif trainer.logger is None:
            kwargs["logger"] = False
        plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins] if trainer.plugins else []
        try:
            return super().instantiate_trainer(
                default_root_dir=out,
                callbacks=callbacks,
                enable_progress_bar=bar,
                enable_model_summary=False,
                plugins=[*plugins, AtomicCheckpointIO()],
                **kwargs,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def before_fit(self) -> None:
        """Say what is about to be trained; move an earlier run in the same folder aside."""
        out = Path(self.config_init.fit.out)
        if not self.trainer.is_global_zero:
            return
        traces = ("config.yaml", "last.ckpt", "best.ckpt", "metrics.csv")
        if not self.goes_on and not self.trainer.fast_dev_run and any((out / name).exists() for name in traces):
            number = next(n for n in range(1, 10**6) if not out.with_name(f"{out.name}.{n}").exists())
            out.rename(out.with_name(f"{out.name}.{number}"))
            say(f"{out} held an earlier run: moved to {out}.{number} (--ckpt_path last would have gone on with it)")
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        data, hp = self.datamodule.hparams, self.model.hparams
        update = data.batch_size * self.trainer.accumulate_grad_batches
        rate = f"{hp.lr:g}"
        if hp.lr_batch is not None:
            rule = hp.get("lr_rule", "linear")
            root = "" if rule == "linear" else f"{rule} of "
            rate = f"{scaled(hp.lr, update, hp.lr_batch, rule):g} = {hp.lr:g} x {root}{update} / {hp.lr_batch}"
        say(
            f"{self.model.title}, {millions:.2f} M parameters, {self.datamodule.num_classes} classes from {data.root}; "
            f"{update} pictures an update, learning rate {rate}; into {out}/"
        )

    def after_fit(self) -> None:
        """Evaluate the best checkpoint, draw the picture and print the result, one line."""
        trainer, out = self.trainer, Path(self.config_init.fit.out)
        if trainer.fast_dev_run or trainer.interrupted:
            return
        weights = next((path for path in (out / "best.ckpt", out / "last.ckpt") if path.exists()), None)
        # evaluation restores callbacks from the checkpoint, and weight averaging would swap its average in once more
        kept = (History, Checkpoints, WeightAveraging)
        trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, kept)]
        self.validate(model=self.model, datamodule=self.datamodule, ckpt_path=weights and str(weights))
        if f"val/{self.figure}" not in trainer.callback_metrics:
            return
        count = self._record("val", str(weights))
        if not trainer.is_global_zero:
            return
        name, best = self.figure_name, float(trainer.callback_metrics[f"val/{self.figure}"])
        title = f"{self.model.title}: {name} {best:.4f} on {count} held-out pictures"
        self.model.draw_result(self.history.rows, self.datamodule.classes, title, out / "result.png")
        of = ""
        if self.history.rows and (epoch := self.checkpoints.best_epoch) is not None:
            last = next(
                row[f"val_{self.figure}"] for row in reversed(self.history.rows) if row[f"val_{self.figure}"] is not None
            )
            of = f" (best, epoch {epoch + 1} of {trainer.max_epochs}; last validation {last:.4f})"
        others = self._text("val", skip=self.figure)
        say(
            f"{name} {best:.4f} on {count} held-out pictures{of}{others and '; ' + others}; weights {weights}; "
            f"curves {out / 'result.png'}"
        )

    def _published_head_fits(self) -> None:
        """Without a checkpoint, published weights must be able to do the task."""
        if self.config_init[self.subcommand].ckpt_path is None:
            self.model.published_fits(self.datamodule)

    before_validate = before_test = before_predict = _published_head_fits

    def validate(self, **kwargs: Any) -> None:
        """Evaluate without Lightning's table."""
        self.trainer.validate(verbose=False, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Evaluate without Lightning's table."""
        self.trainer.test(verbose=False, **kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Predict into ``predictions.csv``; nothing is kept in memory but a row a picture."""
        self.trainer.predict(return_predictions=False, **kwargs)

    def after_validate(self) -> None:
        """Print the figures, one line."""
        self._figures("val")

    def after_test(self) -> None:
        """Print the figures, one line."""
        self._figures("test")

    def after_predict(self) -> None:
        """Say where the predictions lie."""
        say(self.predictions.summary())

    def _text(self, stage: str, skip: str = "") -> str:
        """The figures of an evaluation in print, those that the data has no objects for left out."""
        found = {key.removeprefix(f"{stage}/"): float(value) for key, value in self.trainer.callback_metrics.items()}
        names = self.model.FIGURES
        return ", ".join(f"{names[key]} {found[key]:.4f}" for key in names if key in found and key != skip)

    def _figures(self, stage: str) -> None:
        weights = self.config_init[self.subcommand].ckpt_path or "published weights"
        count, speed = self._record(stage, weights), self.throughput.images_per_second
        pace = f", {speed:.0f} img/s" if speed is not None else ""
        say(f"{self._text(stage)} on {count} pictures ({stage}{pace}); weights {weights}")

    def _record(self, stage: str, weights: str) -> int:
        """Leave the figures, tables and pictures of an evaluation in the run's folder; its number of pictures."""
        trainer, out = self.trainer, Path(self.config_init[self.subcommand].out)
        count = self.model.evaluated()  # every process takes part
        if trainer.is_global_zero:
            out.mkdir(parents=True, exist_ok=True)
            found = {key.removeprefix(f"{stage}/"): float(value) for key, value in trainer.callback_metrics.items()}
            facts = {"task": self.task, "title": self.model.title, "weights": weights, "pictures": count}
            facts["images_per_second"] = self.throughput.images_per_second
            figures = {key: found[key] for key in self.model.FIGURES if key in found}
            write_json(out / f"{stage}_figures.json", {**facts, "figures": figures})
        self.model.record(out, stage)  # every process takes part
        return count
