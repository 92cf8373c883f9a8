"""What detection and segmentation do alike: a head on a backbone's maps, and held-out pictures to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch.optim import Optimizer
from torchmetrics import Metric, SumMetric

from vitzoo.data.errors import UserError
from vitzoo.heads import Maps
from vitzoo.tasks.base import Task
from vitzoo.tasks.draw import Surest, sheet
from vitzoo.tasks.optim import build_optimizer, dense_groups
from vitzoo.tasks.report import draw_dense

__all__ = ["SHOWN", "DenseTask"]

SHOWN = 12  # held-out pictures in the picture of a run


class DenseTask(Task):
    """A head of hyperparameter ``kind`` on the maps of hyperparameter ``backbone``.

    A subclass sets ``model`` and, by :meth:`counted`, the metrics of an evaluation; it says where the ``maps`` are, and puts
    pairs of pictures, truth and prediction, into ``shown`` and ``surest`` when it counts a batch.
    """

    model: Any

    def counted(self, *metrics: Metric) -> None:
        """Start with these metrics: reset before every evaluation, beside the number of pictures."""
        self.count = SumMetric()
        self._metrics = (self.count, *metrics)
        self.shown: list[tuple[Image.Image, Image.Image]] = []
        self.surest = Surest()

    @property
    def maps(self) -> Maps:
        """The backbone under the head."""
        raise NotImplementedError

    def backbone_args(self) -> dict[str, Any]:
        """Fields of the backbone's config: hyperparameters ``kwargs`` and ``drop_path``."""
        hp = self.hparams
        return dict(hp.kwargs) if hp.drop_path is None else {**hp.kwargs, "drop_path_rate": hp.drop_path}

    @property
    def title(self) -> str:
        """Head and backbone."""
        return f"{self.hparams.kind} on {self.hparams.backbone}"

    @property
    def class_names(self) -> list[str]:
        """Of the data; none where the task runs without it."""
        return list(getattr(getattr(self.trainer, "datamodule", None), "classes", ())) if self._trainer is not None else []

    def setup(self, stage: str) -> None:
        """Say what was done to the backbone's maps."""
        if stage == "fit" and self.global_rank == 0:
            from vitzoo.tasks.progress import say

            for note in self.maps.notes:
                say(f"{self.hparams.backbone}: {note}")

    def make_optimizer(self, lr: float) -> Optimizer:
        """timm's optimiser over the head and what is not frozen of the backbone."""
        hp = self.hparams
        try:
            groups = dense_groups(self.model, self.maps, hp.weight_decay, hp.layer_decay)
        except ValueError as error:
            raise UserError(str(error)) from error
        return build_optimizer(groups, hp.optimizer, lr, hp.weight_decay, None, dict(hp.optimizer_kwargs))

    def start_counting(self) -> None:
        """Forget the pictures of the evaluation before."""
        for metric in self._metrics:
            metric.reset()
        self.shown.clear()
        self.surest = Surest()

    def evaluated(self) -> int:
        """Pictures of the last evaluation; every process takes part."""
        return int(self.count.compute())

    def draw_result(self, rows: list[dict[str, Any]], classes: list[str], title: str, path: Path) -> None:
        """Learning curve of the first figure, and held-out pictures with truth and prediction side by side."""
        grid = sheet([picture for pair in self.shown for picture in pair], columns=6, edge=200)
        key, name = next(iter(self.FIGURES.items()))
        draw_dense(rows, key, name, grid, title, path)
