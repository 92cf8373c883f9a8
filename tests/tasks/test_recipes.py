"""What our configs of Swin-T, DeiT-S and NAT-T build, against the published values, number by number."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from timm.data import RandomResizedCropAndInterpolation
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torchvision.transforms import InterpolationMode, RandomHorizontalFlip

from vitzoo.data import ImageData
from vitzoo.data.batches import StepBatches
from vitzoo.tasks import Classification

CONFIGS = Path(__file__).resolve().parents[2] / "configs/imagenet"
PICTURES = 1_281_167


class Published(NamedTuple):
    """Of the sheets swin.md and nat.md, and of DeiT's script (token_evit.md; Touvron et al. 2021, table 9)."""

    drop_path: float
    batch: int
    epochs: int
    warmup: int
    cooldown: int
    rates: tuple[float, float, float]  # warm-up's start, peak, end
    clip: float | None
    ema: float | None
    repeats: int
    undecayed: tuple[str, ...]  # beside vectors and biases


RECIPES = {
    "swin_tiny": Published(0.2, 1024, 300, 20, 0, (1e-6, 1e-3, 1e-5), 5.0, None, 1, ("rel_bias",)),
    "deit_small": Published(0.1, 1024, 300, 5, 0, (1e-6, 1e-3, 1e-5), None, 0.99996, 3, ("pos_embed", "cls_token")),
    "nat_tiny": Published(0.2, 1024, 310, 20, 10, (1e-6, 1e-3, 5e-6), 5.0, None, 1, ("rel_bias",)),
}


class Built(NamedTuple):
    published: Published
    settings: dict[str, Any]
    task: Any
    data: Any
    optimizer: Any
    schedule: Any


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request):
    settings = yaml.safe_load((CONFIGS / f"{request.param}.yaml").read_text())
    with torch.device("meta"):
        task: Any = Classification(num_classes=1000, **settings["model"])
    data: Any = ImageData(**{**settings["data"], "root": "digits"})
    data.sets = {"train": range(PICTURES)}
    data.trainer = trainer = SimpleNamespace(
        lightning_module=task, datamodule=data, global_rank=0, world_size=1, limit_train_batches=1.0, fast_dev_run=False,
        max_epochs=settings["trainer"]["max_epochs"], accumulate_grad_batches=1, state=SimpleNamespace(fn="fit"),
    )  # fmt: skip
    task._trainer = trainer
    made = task.configure_optimizers()
    return Built(RECIPES[request.param], settings, task, data, made["optimizer"], made["lr_scheduler"]["scheduler"])


def test_parameter_groups(recipe):
    optimizer, names = recipe.optimizer, {id(p): name for name, p in recipe.task.model.named_parameters()}
    assert type(optimizer) is torch.optim.AdamW
    decays = {}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, 0.999)
        assert group["eps"] == 1e-8
        decays |= {names[id(p)]: group["weight_decay"] for p in group["params"]}
    assert decays.keys() == set(names.values())
    for name, p in recipe.task.model.named_parameters():
        exempt = p.ndim <= 1 or name.endswith((".bias", *recipe.published.undecayed))
        assert decays[name] == (0.0 if exempt else 0.05), name
    for kind in recipe.published.undecayed:
        assert any(name.endswith(kind) for name in decays)


def test_learning_rate_at_chosen_updates(recipe):
    p, per_epoch = recipe.published, PICTURES // recipe.published.batch
    assert per_epoch == 1251
    start, peak, end = p.rates
    curve = (p.epochs - p.cooldown) * per_epoch  # of the cosine, warm-up included: timm's rule, which all three used
    expected = {
        0: start,
        p.warmup * per_epoch // 2: start + (peak - start) * (p.warmup * per_epoch // 2) / (p.warmup * per_epoch),
        **{
            step: end + (peak - end) * (1 + math.cos(math.pi * step / curve)) / 2
            for step in (p.warmup * per_epoch, 100 * per_epoch + 7, 299 * per_epoch, curve - 1)
        },
        p.epochs * per_epoch: end,
    }
    found = {}
    for step in expected:
        recipe.schedule.step(step)
        (found[step],) = {group["lr"] for group in recipe.optimizer.param_groups}
    assert found == pytest.approx(expected, rel=1e-9)


def test_augmentation_pipeline(recipe):
    data = recipe.data
    data.sets = {}
    data.splits, data.enough = {}, lambda: None
    data.setup("fit")
    crop, flip, policy, *rest, normalise, erasing = data.sets["train"].transform.transforms
    assert isinstance(crop, RandomResizedCropAndInterpolation)
    assert (tuple(crop.size), tuple(crop.scale)) == ((224, 224), (0.08, 1.0))
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3), abs=1e-4)
    assert crop.interpolation == InterpolationMode.BICUBIC or crop.interpolation == "bicubic"
    assert isinstance(flip, RandomHorizontalFlip)
    assert flip.p == 0.5
    assert type(policy).__name__ == "RandAugment"
    assert policy.num_layers == 2
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in policy.ops} == {(9, 0.5, 0.5)}
    assert {(op.hparams["translate_const"], op.hparams["img_mean"]) for op in policy.ops} == {(100, (124, 116, 104))}
    assert "PosterizeIncreasing" in {op.name for op in policy.ops}
    assert len(rest) == 1  # to a tensor; jitter gives way to the policy, as in timm and the published scripts
    assert recipe.settings["data"]["color_jitter"] == (0.3 if recipe.published.repeats == 3 else 0.4)
    assert tuple(normalise.mean.flatten().tolist() if torch.is_tensor(normalise.mean) else normalise.mean) == pytest.approx(
        (0.485, 0.456, 0.406)
    )
    assert isinstance(erasing, RandomErasing)
    assert (erasing.probability, erasing.min_count, erasing.max_count, erasing.per_pixel) == (0.25, 1, 1, True)


def test_evaluation_pipeline(recipe):
    data = recipe.data
    data.sets, data.splits = {}, {}
    data.setup("validate")
    resize, crop, _, normalise = data.sets["val"].transform.transforms
    assert (resize.size, str(resize.interpolation).rpartition(".")[2].lower()) == (256, "bicubic")  # 224 of 256 is 0.875
    assert tuple(crop.size) == (224, 224)
    assert normalise.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert data.hparams.exif is False


def test_loss_and_mixing(recipe):
    mixup = recipe.task.mixup
    assert isinstance(recipe.task.loss, SoftTargetCrossEntropy)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.mix_prob, mixup.switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (mixup.mode, mixup.label_smoothing, mixup.num_classes) == ("batch", 0.1, 1000)


def test_drop_path_rises_linearly_over_the_blocks(recipe):
    rates = [m.drop_prob for m in recipe.task.model.modules() if hasattr(m, "drop_prob")]
    distinct = sorted({0.0, *rates})
    assert distinct[-1] == pytest.approx(recipe.published.drop_path)
    gaps = [b - a for a, b in itertools.pairwise(distinct)]
    assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-5)


def test_epochs_clipping_averaging_and_repeats(recipe):
    p, trainer = recipe.published, recipe.settings["trainer"]
    assert (trainer["max_epochs"], trainer.get("gradient_clip_val")) == (p.epochs, p.clip)
    averaging = recipe.task.configure_callbacks()
    assert len(averaging) == (p.ema is not None)
    assert recipe.task.hparams.ema == p.ema
    assert recipe.data.hparams.repeats == p.repeats
    recipe.data.sets = {"train": range(PICTURES)}
    batches = recipe.data._batches((0, 0))
    assert isinstance(batches, StepBatches)
    first = [index for index, *_ in next(iter(batches))]
    assert len(first) == p.batch
    assert len(set(first)) == math.ceil(p.batch / p.repeats)
