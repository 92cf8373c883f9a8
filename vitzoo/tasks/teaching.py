"""What a trained model teaches another: hard and soft labels (DeiT), and a label for each place of its map (LV-ViT)."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.nn import functional as F

import vitzoo
from vitzoo.data.errors import UserError
from vitzoo.tasks.tuning import load_weights

__all__ = ["KINDS", "Teacher", "TokenHead", "distilled", "places"]

KINDS = ("hard", "soft", "token")


class Teacher:
    """A frozen classifier that sees what the student sees. No module: checkpoints, averages and optimisers must not hold it.

    Args:
        name: Of the zoo or of timm.
        weights: A file of weights; None: its published ones.
        classes: Of the data.
        kwargs: Further arguments of the model.
        img_size: Edge that it is shown pictures at; None: as the student sees them.

    Raises:
        UserError: An unknown model, weights that do not fit or of another number of classes.
    """

    def __init__(self, name: str, weights: str | None, classes: int, kwargs: dict[str, Any], img_size: int | None) -> None:
        self.img_size = img_size
        try:
            if weights is not None:
                kwargs = {**kwargs, "num_classes": classes}
            model: Any = vitzoo.create_model(name, pretrained=weights is None, **kwargs)
        except (TypeError, ValueError, RuntimeError, KeyError, OSError) as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise UserError(f"model.teacher {name!r}: {text}") from error
        if weights is not None:
            load_weights(model, weights)
        if model.num_classes != classes:
            raise UserError(
                f"model.teacher {name!r} knows {model.num_classes} classes and the data has {classes}: give "
                "--model.teacher_weights, a checkpoint trained on this data."
            )
        self.model = model.eval().requires_grad_(False)
        self.config = resolve_data_config({}, model=model)
        self.change: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Teacher:
        return self

    def to(self, device: torch.device, mean: Any, std: Any) -> None:
        """Move to a device, and learn how the student's pictures are normalised.

        Args:
            device: Where the batches are.
            mean: Of the student's data config.
            std: Likewise.
        """
        self.model.to(device)
        ours, theirs = torch.tensor([list(mean), list(std)]), torch.tensor([self.config["mean"], self.config["std"]])
        if not torch.allclose(ours, theirs):
            factor, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
            self.change = factor.view(1, -1, 1, 1).to(device), shift.view(1, -1, 1, 1).to(device)

    def _seen(self, images: Tensor) -> Tensor:
        if self.change is not None:
            images = images * self.change[0] + self.change[1]
        if self.img_size is not None and images.shape[-1] != self.img_size:
            images = F.interpolate(images, (self.img_size, self.img_size), mode="bicubic", antialias=True)
        return images

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of the student's pictures ``[B, 3, H, W]``."""
        return self.model(self._seen(images)).float()

    @torch.no_grad()
    def of_places(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes, h, w]`` of every place of the last map: what the classifier says of it alone."""
        found = self.model.forward_intermediates(self._seen(images), indices=1, norm=True, intermediates_only=True)[-1]
        head = self.model.get_classifier()
        head = head[0] if isinstance(head, tuple) else head
        if not isinstance(head, nn.Linear) or head.in_features != found.shape[1]:
            raise UserError(
                f"{type(self.model).__name__} cannot label places: its classifier is no Linear over its last map's "
                f"{found.shape[1]} channels. Take another model.teacher, or --model.distill soft."
            )
        return head(found.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).float()


class TokenHead(nn.Module):
    """A second classifier, over every place of the student's last map; only trained with, never evaluated.

    Args:
        channels: Of the map.
        classes: Of the data.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, places: Tensor) -> Tensor:
        """Logits ``[B, classes, h, w]`` of a map ``[B, channels, h, w]``."""
        return self.fc(places.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def places(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over places of the cross-entropy with the teacher's soft labels (Jiang et al. 2021, arXiv:2104.10858).

    Their labels lie in files and are cropped with the picture; here the teacher labels the picture that the student sees.

    Args:
        logits: The student's, ``[B, classes, h, w]``.
        teacher: The teacher's; its probabilities are resized to the student's map.

    Returns:
        A scalar.
    """
    labels = teacher.softmax(1)
    if labels.shape[-2:] != logits.shape[-2:]:
        labels = F.interpolate(labels, logits.shape[-2:], mode="bilinear")
    return -(labels * logits.float().log_softmax(1)).sum(1).mean()


def distilled(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """DeiT's distillation loss (Touvron et al. 2021, arXiv:2012.12877, section 4).

    Args:
        student: Logits ``[B, classes]``, of the distillation token where there is one.
        teacher: Logits likewise.
        kind: "hard": cross-entropy with the teacher's decision; "soft": ``T^2 KL(teacher / T || student / T)``.
        temperature: T.

    Returns:
        A scalar, the mean over the batch.
    """
    if kind == "hard":
        return F.cross_entropy(student.float(), teacher.argmax(-1))
    ours, theirs = (student.float() / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
