"""Attention maps: what the queries of one layer take of its keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitzoo.explain._record import Record, recording, weights_of
from vitzoo.explain._steps import follow, steps_of


def nothing_seen(model: nn.Module) -> str:
    """Why there is nothing to show of a model that calls no softmax op."""
    return (
        f"{type(model).__name__} called no softmax attention of vitzoo. A model of timm's does after vitzoo.accelerate(model); "
        "one without attention never will."
    )


def list_attentions(model: nn.Module, x: Tensor) -> list[tuple[str, str]]:
    """The calls of softmax attention that a model makes, in order.

    Args:
        model: any module.
        x: an image ``[B, C, H, W]``; one is enough.

    Returns:
        The path of the module that calls, and the op.
    """
    with torch.no_grad(), recording(model) as records:
        model(x)
    return [(record.name, record.op) for record in records]


@torch.no_grad()
def attention_maps(model: nn.Module, x: Tensor, layer: int | str = -1, head: int | None = None) -> Tensor:
    """What each query of a layer takes of each key, by the definition of its op: ``softmax(scale q k^T + bias)``.

    Args:
        model: any module whose attention is vitzoo's.
        x: images ``[B, C, H, W]``.
        layer: which call of a softmax op: its number in the order in which they run, negative ones from the end, or the
            path of the module that makes it (its first call). Agent attention makes two calls, the agents' first.
        head: one head; None for all.

    Returns:
        ``[B, N, L, S]``, or ``[B, L, S]`` of one head; at least fp32, rows sum to one. The tokens of maps come row by row,
        those that a map was padded with included.

    Raises:
        ValueError: there is no such call or head, or the weights would not fit into memory.
    """
    with recording(model) as records:
        model(x)
    record = find(model, records, layer)
    weights = weights_of(record.op, record.call)
    if head is None:
        return weights
    if not -weights.shape[1] <= head < weights.shape[1]:
        raise ValueError(f"{record.name} has {weights.shape[1]} heads, there is no head {head}.")
    return weights[:, head]


@torch.no_grad()
def attention_heat(model: nn.Module, x: Tensor, layer: int = -1, head: int | None = None) -> Tensor:
    """What the class token, or the mean of the map, takes of each token in one layer.

    Args:
        model: any module whose attention is vitzoo's.
        x: images ``[B, C, H, W]``.
        layer: number of the module that attends, in the order in which they run; negative ones from the end.
        head: one head; None for their mean.

    Returns:
        ``[B, h, w]`` on the map of that layer; with the share of prefix tokens and of padding they sum to one.

    Raises:
        ValueError: there is no such layer or head, or it cannot be laid on a map.
    """
    with recording(model) as records:
        model(x)
    if not records:
        raise ValueError(nothing_seen(model))
    names = list(dict.fromkeys(record.name for record in records))
    if not -len(names) <= layer < len(names):
        raise ValueError(f"{type(model).__name__} attends in {len(names)} layers, there is no layer {layer}.")
    chosen = [record for record in records if record.name == names[layer]]

    def fuse(weights: Tensor) -> Tensor:
        if head is None:
            return weights.mean(dim=1)
        if not -weights.shape[1] <= head < weights.shape[1]:
            raise ValueError(f"{names[layer]} has {weights.shape[1]} heads, there is no head {head}.")
        return weights[:, head]

    steps = steps_of(model, x, chosen, [weights_of(record.op, record.call) for record in chosen], fuse)
    return follow(model, steps, lambda row, matrix: row @ matrix)


def find(model: nn.Module, records: list[Record], layer: int | str) -> Record:
    """The record that a number or a path means; raises ValueError where there is none."""
    if not records:
        raise ValueError(nothing_seen(model))
    if isinstance(layer, int):
        if not -len(records) <= layer < len(records):
            raise ValueError(f"{type(model).__name__} attends {len(records)} times, there is no layer {layer}.")
        return records[layer]
    for record in records:
        if record.name == layer:
            return record
    names = list(dict.fromkeys(record.name for record in records))
    raise ValueError(f"No attention is called from '{layer}'. It is from: {', '.join(names[:6])}{', ...' * (len(names) > 6)}.")
