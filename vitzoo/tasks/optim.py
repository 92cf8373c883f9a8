"""timm's optimisers and schedules, counted in updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from vitzoo.data.errors import UserError
from vitzoo.heads.maps import Maps, parameter_layers, undecayed

__all__ = ["SCHEDULES", "build_optimizer", "build_schedule", "dense_groups", "scaled", "updates_per_epoch"]

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant")  # of timm's, those that are counted in updates


def scaled(lr: float, batch: int, base_batch: int | None, rule: str = "linear") -> float:
    """``lr * (batch / base_batch)``, or its square root with the rule "sqrt"; ``lr`` itself where no ``base_batch`` is given.

    UserError where the rule is another.
    """
    if rule not in ("linear", "sqrt"):
        raise UserError(f"model.lr_rule is {rule!r} and must be 'linear' or 'sqrt'.")
    return lr if base_batch is None else lr * (batch / base_batch) ** (1.0 if rule == "linear" else 0.5)


def updates_per_epoch(batches: int, accumulate: int) -> int:
    """Optimiser updates in an epoch: the last one comes at its end, however few batches it has."""
    return math.ceil(batches / accumulate)


def build_optimizer(
    model: nn.Module | list[dict[str, Any]],
    name: str,
    lr: float,
    weight_decay: float,
    layer_decay: float | None,
    kwargs: dict[str, Any],
) -> Optimizer:
    """timm's optimiser ``name`` with parameter groups from the model's ``no_weight_decay`` and ``group_matcher``.

    Groups that are given stay as they are.

    With ``layer_decay`` each group has an ``lr_scale``, which only timm's schedules apply.
    """
    return create_optimizer_v2(model, name, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, **kwargs)


def dense_groups(model: nn.Module, maps: Maps, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
    """Parameter groups of a detector or segmenter over a backbone.

    Norms, biases and what the backbone's ``no_weight_decay`` names do not decay. With ``layer_decay`` d the last layer of
    the backbone learns at d times the rate of the heads, the one below at d**2 and so on (``lr_scale``, which only timm's
    schedules apply). Frozen parameters are in no group.

    Args:
        model: holds ``maps``.
        maps: the backbone.
        weight_decay: of what decays.
        layer_decay: d; None: one rate.

    Returns:
        Groups with ``params``, ``weight_decay``, ``lr_scale`` and ``param_names``.
    """
    prefix = next(name for name, module in model.named_modules() if module is maps) + "."
    layers = {prefix + name: layer for name, layer in parameter_layers(maps).items()} if layer_decay is not None else {}
    order = sorted(set(layers.values()))
    exempt = {prefix + name for name in undecayed(maps)}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else weight_decay
        scale = float(layer_decay or 1.0) ** (len(order) - order.index(layers[name])) if name in layers else 1.0
        group = groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale, "param_names": []})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def build_schedule(
    optimizer: Optimizer,
    name: str,
    *,
    epochs: int,
    per_epoch: int,
    warmup_epochs: float,
    cooldown_epochs: float,
    warmup_lr: float,
    min_lr: float,
    warmup_prefix: bool = False,
    decay_epochs: float = 30,
    decay_rate: float = 0.1,
    milestones: Sequence[float] = (),
) -> Scheduler:
    """timm's schedule ``name`` whose unit is one update: step it with the number of updates done.

    Args:
        optimizer: Its groups' ``lr`` is the peak.
        name: As in timm: "cosine", "step", "multistep", "poly", "constant", ...
        epochs: Of the run, warm-up and cool-down among them.
        per_epoch: Updates in an epoch.
        warmup_epochs: Linear from ``warmup_lr``.
        cooldown_epochs: At the end, at ``min_lr``.
        warmup_lr: Where the warm-up starts.
        min_lr: Where the decay ends.
        warmup_prefix: The decay begins after the warm-up; else its curve is cut by it (timm's default).
        decay_epochs: Between the steps of "step".
        decay_rate: Of "step" and "multistep", and the power of "poly".
        milestones: Epochs at which "multistep" decays.

    Returns:
        timm's schedule, already at its first value.
    """
    warmup = round(warmup_epochs * per_epoch)
    total = round((epochs - cooldown_epochs) * per_epoch)
    schedule, _ = create_scheduler_v2(
        optimizer,
        name,
        num_epochs=total - warmup if warmup_prefix else total,
        warmup_epochs=warmup,
        warmup_prefix=warmup_prefix,
        cooldown_epochs=round(cooldown_epochs * per_epoch),
        warmup_lr=warmup_lr,
        min_lr=min_lr,
        decay_epochs=decay_epochs * per_epoch,
        decay_rate=decay_rate,
        decay_milestones=[round(epoch * per_epoch) + 1 for epoch in milestones],  # timm decays one update before
        step_on_epochs=True,
    )
    schedule.step(0)  # without warm-up timm applies neither lr_scale nor the curve before the first step
    return schedule
