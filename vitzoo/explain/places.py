"""Where a model looks by other means than weights over all tokens: sampling points, agents, slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.explain._record import recording, weights_of
from vitzoo.layers import AgentAttention, DeformableAttention


@torch.no_grad()
def sampling_points(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Where deformable attention reads its keys and values (DAT, DAT++).

    Args:
        model: one with ``DeformableAttention`` in it.
        x: images ``[B, C, H, W]``.

    Returns:
        ``[B, h, w, G, 2]`` by the path of the layer: (row, column), -1 the centre of the first row or column of its map and 1
        that of the last; G groups of channels have points of their own.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, DeformableAttention)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no deformable attention, so it samples no points. DAT does.")
    points: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(layer: DeformableAttention, args: tuple[Tensor, ...]) -> None:
            points[name] = layer.points(args[0])

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return points


@torch.no_grad()
def agent_maps(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each agent gathers from the map (agent attention): ``softmax(a k^T + B1)``.

    Args:
        model: one with ``AgentAttention`` in it, on maps.
        x: images ``[B, C, H, W]``.

    Returns:
        ``[B, N, A, h, w]`` by the path of the layer, N heads and A agents, over the map of the keys; prefix tokens are left
        out, with them every agent's weights sum to one.

    Raises:
        ValueError: the model has no such layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AgentAttention)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no agents. Those of the families agent and of mixer='agent' have.")
    with recording(model) as records:
        model(x)
    maps: dict[str, Tensor] = {}
    for record in records:
        if record.name not in layers or record.name in maps:  # a layer's second call hands out
            continue
        weights = weights_of(record.op, record.call)
        layer = layers[record.name]
        grid = next(r.grid for r in records if r.name == record.name and r.grid is not None)
        small = -(-grid[0] // layer.kv_ratio), -(-grid[1] // layer.kv_ratio)
        maps[record.name] = weights[..., weights.shape[-1] - small[0] * small[1] :].unflatten(-1, small)
    return maps


@torch.no_grad()
def slot_maps(model: Any, x: Tensor) -> dict[str, Tensor]:
    """How much of every token's answer comes from which slot (GLNet).

    Args:
        model: a GLNet.
        x: images ``[B, C, H, W]``.

    Returns:
        ``[B, S, h, w]`` by the path of the layer; over the slots they sum to one.

    Raises:
        ValueError: the model has no slots.
    """
    own = getattr(model, "slot_maps", None)
    if own is None:
        raise ValueError(f"{type(model).__name__} has no slots. GLNet does.")
    return own(x)
