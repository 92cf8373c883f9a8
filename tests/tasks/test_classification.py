from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitzoo.data import UserError
from vitzoo.tasks import Classification


def task(**kwargs):
    return Classification("nat_micro", kwargs.pop("num_classes", 6), **kwargs)


def batch(size=4, classes=6):
    return torch.rand(size, 3, 32, 32), torch.arange(size) % classes


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match=r"nat_mikro.*nat_micro"):
        Classification("nat_mikro", 3)


def test_an_argument_the_model_does_not_take_is_named():
    with pytest.raises(UserError, match=r"kernl_size.*kernel_size"):
        task(kwargs={"kernl_size": 5})


def test_drop_path_and_arguments_reach_the_model():
    rates = [m.drop_prob for m in task(drop_path=0.25).modules() if getattr(m, "drop_prob", 0)]
    assert max(rates) == pytest.approx(0.25)


@pytest.mark.parametrize("settings", [{}, {"mixup": 0.8, "cutmix": 1.0}, {"loss": "bce"}, {"loss": "bce", "mixup": 0.5}])
def test_every_loss_is_finite_and_reaches_every_parameter(settings):
    module = task(**settings)
    module.training_step(batch(), 0).backward()
    assert module.last_loss.isfinite()
    assert not module.last_loss.requires_grad
    assert all(p.grad is not None for p in module.parameters())


def test_smoothed_cross_entropy_is_pytorchs():
    module = task(smoothing=0.1).eval()
    images, labels = batch()
    expected = F.cross_entropy(module(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(module.training_step((images, labels), 0), expected)


def test_an_unreadable_picture_counts_as_wrong_whatever_the_model_says():
    module = task().eval()
    images, labels = batch()
    with torch.no_grad():
        said = module(images).argmax(-1)
        module.count_batch((images, torch.cat([said[:2], -1 - said[2:]])))
    assert module.figures.accuracy.compute()["top1"] == 0.5
    assert module.figures.confusion.compute().sum() == 4
    assert module.figures.confusion.compute().diagonal().sum() == 2
    assert module.figures.loss.compute().isfinite()


def test_top5_needs_five_classes():
    assert "top5" not in task(num_classes=4).figures.accuracy
    assert "top5" in task(num_classes=5).figures.accuracy


@pytest.mark.parametrize("settings", [{"channels_last": True}, {"grad_checkpointing": True}])
def test_memory_options_change_no_result(settings):
    plain, other = task(), task(**settings)
    other.load_state_dict(plain.state_dict())
    images, labels = batch()
    losses = [module.training_step((images, labels), 0) for module in (plain, other)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_an_unknown_loss_is_refused():
    with pytest.raises(UserError, match="'ce' or 'bce'"):
        task(loss="mse")


@pytest.mark.parametrize(
    ("stored", "words"), [({"num_classes": 7}, "7 and this run has 6"), ({"name": "vit"}, "vit.*nat_micro")]
)
def test_a_checkpoint_of_another_model_is_refused(stored, words):
    module = task()
    with pytest.raises(UserError, match=words):
        module.on_load_checkpoint({"hyper_parameters": {"name": "nat_micro", "num_classes": 6, **stored}})


def test_hyperparameters_are_plain_values():
    hparams = dict(task(kwargs={"mlp_ratio": 2.0}).hparams)
    assert hparams["kwargs"] == {"mlp_ratio": 2.0}
    plain = (str, int, float, bool, dict, list, type(None))
    assert all(isinstance(value, plain) for value in hparams.values())
