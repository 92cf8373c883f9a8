from __future__ import annotations

import math

import pytest
import torch

import vitzoo
from vitzoo.tasks.optim import build_optimizer, build_schedule, scaled, updates_per_epoch


def schedule_of(parameter_lr=1e-3, name="cosine", epochs=31, warmup_epochs=2, cooldown_epochs=1, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=parameter_lr)
    settings = dict(per_epoch=10, warmup_epochs=warmup_epochs, cooldown_epochs=cooldown_epochs, warmup_lr=1e-6, min_lr=5e-6)
    return optimizer, build_schedule(optimizer, name, epochs=epochs, **{**settings, **kwargs})


def rates(steps, **kwargs):
    optimizer, schedule = schedule_of(**kwargs)
    found = []
    for step in steps:
        schedule.step(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_warm_up_and_cosine_are_counted_in_updates():
    assert rates([0, 10, 20, 150, 300, 309]) == pytest.approx(
        [1e-6, (1e-6 + 1e-3) / 2, 5e-6 + (1e-3 - 5e-6) * (1 + math.cos(math.pi * 20 / 300)) / 2, (1e-3 + 5e-6) / 2, 5e-6, 5e-6]
    )


def test_with_warm_up_as_prefix_the_cosine_starts_at_the_peak():
    assert rates([20, 160, 300], warmup_prefix=True) == pytest.approx([1e-3, (1e-3 + 5e-6) / 2, 5e-6])


def test_without_warm_up_the_first_update_has_the_peak_rate():
    optimizer, _ = schedule_of(warmup_epochs=0)
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_step_schedule_decays_by_epochs():
    found = rates([0, 299, 300, 600], name="step", epochs=90, warmup_epochs=0, cooldown_epochs=0)
    assert found == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])


def test_rate_scales_with_the_updates_pictures():
    assert scaled(5e-4, 1024, 512) == 1e-3
    assert scaled(5e-4, 1024, None) == 5e-4


def test_the_last_update_of_an_epoch_may_be_a_short_one():
    assert updates_per_epoch(9, 2) == 5


def test_layer_decay_lowers_the_rate_towards_the_stem():
    model = vitzoo.create_model("nat_micro", num_classes=3)
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.05, 0.5, {})
    build_schedule(optimizer, "cosine", epochs=4, per_epoch=5, warmup_epochs=0, cooldown_epochs=0, warmup_lr=0, min_lr=0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = [rate[id(p)] for p in model.parameters()]
    assert found[-1] == 1e-3  # the head
    assert found[0] < 0.1 * found[-1]
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)


def test_biases_norms_and_what_the_model_names_are_not_decayed():
    model = vitzoo.create_model("nat_micro", num_classes=3)
    decayed = {
        id(p)
        for group in build_optimizer(model, "adamw", 1e-3, 0.05, None, {}).param_groups
        if group["weight_decay"] > 0
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or name.endswith(".bias") or name in model.no_weight_decay()
        assert (id(parameter) in decayed) is not exempt, name
