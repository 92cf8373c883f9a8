"""Attention weights of the softmax ops while a model runs: which call, from which module, on which map.

A fused op never holds them, so they are computed by the op's definition, beside it or in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.ops import PointBias, watching
from vitzoo.ops._softmax import probabilities, safe_logsumexp
from vitzoo.ops.attend.reference import biased_scores
from vitzoo.ops.attend2d.reference import masked_scores
from vitzoo.ops.attend_routed.reference import by_region, gather_chosen, to_map

SOFTMAX_OPS = ("attend", "attend2d", "attend_routed")
LARGEST = 2**29
"""Weights of one call that are computed at most, batch and heads included: 2 GiB in fp32."""

Grid = tuple[int, int]


@dataclass(frozen=True)
class Record:
    """One call of a softmax op.

    Attributes:
        name: path of the module that called, as ``named_modules`` gives it.
        op: name of the op.
        call: its validated arguments.
        grid: rows and columns of the map that the module was given, before it was padded; None: of tokens, of which the
            model knows the map.
        padded: rows and columns of the map that the op was given; None where it was given tokens.
        weights: ``[B, N, L, S]`` where they were computed in the op's place, part of the graph.
    """

    name: str
    op: str
    call: Any
    grid: Grid | None
    padded: Grid | None
    weights: Tensor | None = None


def weights_of(op: str, call: Any) -> Tensor:
    """What each query takes of each key.

    Args:
        op: name of a softmax op.
        call: its validated arguments.

    Returns:
        ``[B, N, L, S]``, at least fp32; the tokens of maps row by row, zero where a pattern or a route sees nothing.

    Raises:
        ValueError: there would be more than ``LARGEST`` of them.
    """
    batch, heads = call.q.shape[0], call.q.shape[-2]
    queries, keys = (t[0, ..., 0, 0].numel() for t in (call.q, call.k))
    if batch * heads * queries * keys > LARGEST:
        raise ValueError(
            f"{queries} queries and {keys} keys with {heads} heads are {batch * heads * queries * keys:,} weights, more than "
            f"{LARGEST:,}. Give a smaller image or fewer of them, or choose a later layer."
        )
    if op == "attend":
        bias = call.bias.defined() if isinstance(call.bias, PointBias) else call.bias
        scores = biased_scores(call.q, call.k, bias, call.key_bias, call.scale)
        return probabilities(scores, safe_logsumexp(scores))
    if op == "attend2d":
        scores = masked_scores(call.q, call.k, call.pattern, call.bias, call.scale)
        return scores.flatten(4, 5).flatten(2, 3).softmax(dim=-1)
    return _routed(call)


def _routed(call: Any) -> Tensor:
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q = by_region(call.q.to(wide), call.regions)
    k = gather_chosen(by_region(call.k.to(wide), call.key_regions), call.graph)
    chosen = torch.softmax(call.scale * q @ k.transpose(-2, -1), -1)  # [B, R, N, tokens, K * tokens]
    places = torch.arange(call.k.shape[1] * call.k.shape[2], device=k.device).view(1, *call.k.shape[1:3], 1, 1)
    places = by_region(places.expand(*call.k.shape[:4], 1), call.key_regions)
    places = gather_chosen(places, call.graph).transpose(-2, -1).expand_as(chosen)
    every = chosen.new_zeros(*chosen.shape[:4], call.k.shape[1] * call.k.shape[2]).scatter_add(-1, places, chosen)
    return to_map(every, call.regions, call.q).flatten(1, 2).transpose(1, 2)


def results_of(op: str, call: Any, weights: Tensor) -> tuple:
    """What the op returns, by these weights of its keys."""
    values = call.v if op == "attend" else call.v.flatten(1, 2)
    out = torch.einsum("bnls,bsnd->blnd", weights, values.to(weights.dtype)).to(call.q.dtype)
    if op == "attend":
        return out, _lse(op, call)
    out = out.unflatten(1, call.q.shape[1:3])
    return (out, _lse(op, call)) if op == "attend2d" else (out,)


def _lse(op: str, call: Any) -> Tensor | None:
    if not call.return_lse:
        return None
    if op == "attend":
        bias = call.bias.defined() if isinstance(call.bias, PointBias) else call.bias
        return safe_logsumexp(biased_scores(call.q, call.k, bias, call.key_bias, call.scale)).transpose(1, 2)
    scores = masked_scores(call.q, call.k, call.pattern, call.bias, call.scale)
    return torch.logsumexp(scores, (-2, -1)).permute(0, 2, 3, 1)


@contextmanager
def recording(model: nn.Module, in_graph: bool = False) -> Iterator[list[Record]]:
    """Collect the calls of softmax ops while ``model`` runs in the block.

    Args:
        model: any module; every module in it carries hooks meanwhile, which also keeps it from working in place.
        in_graph: compute the weights in the op's place and keep them, for gradients with respect to them.

    Yields:
        list[Record]: filled in the order in which the calls run.
    """
    records: list[Record] = []
    running: list[tuple[str, tuple]] = []

    def enter(name: str, module: nn.Module, args: tuple) -> None:
        running.append((name, args))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop()

    def watch(op: str, call: Any) -> tuple | None:
        if op not in SOFTMAX_OPS:
            return None
        padded = None if op == "attend" else (call.q.shape[1], call.q.shape[2])
        record = Record(running[-1][0] if running else "", op, call, _grid(running, call.q.shape[1], padded), padded)
        if not in_graph:
            records.append(record)
            return None
        weights = weights_of(op, call)
        records.append(replace(record, weights=weights))
        return results_of(op, call, weights)

    handles = [m.register_forward_pre_hook(partial(enter, name)) for name, m in model.named_modules()]
    handles += [m.register_forward_hook(leave, always_call=True) for m in model.modules()]
    try:
        with watching(watch):
            yield records
    finally:
        for handle in handles:
            handle.remove()


def _grid(running: list[tuple[str, tuple]], length: int, padded: Grid | None) -> Grid | None:
    """The map that the innermost module that was given one was given: channels last, or tokens beside their size."""
    for _, args in reversed(running):
        if not args or not isinstance(args[0], Tensor):
            continue
        shape = args[0].shape
        if len(shape) == 4:
            height, width = shape[1], shape[2]
            if padded is not None and height <= padded[0] and width <= padded[1]:
                return height, width
            if padded is None and height * width == length:
                return height, width
        sizes = args[1] if len(args) > 1 and isinstance(args[1], tuple) else args[1:3]
        if len(sizes) == 2 and all(isinstance(n, int) for n in sizes) and 0 <= length - sizes[0] * sizes[1] <= 8:
            return sizes[0], sizes[1]
    return None


def token_grid(model: Any, x: Tensor, length: int) -> tuple[Grid, int]:
    """Rows and columns of the patches in ``length`` tokens of a plain transformer, and the tokens before them.

    Args:
        model: it says ``num_prefix_tokens``, and its size of a patch in ``patch_embed.patch_size`` or ``cfg.patch_size``.
        x: the image.
        length: tokens.

    Returns:
        The grid and the number of prefix tokens.

    Raises:
        ValueError: the patches of the image are not these tokens.
    """
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    size = getattr(getattr(model, "cfg", None), "patch_size", None)
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None) if size is None else size
    if size is not None:
        rows, cols = (size, size) if isinstance(size, int) else size
        grid = -(-x.shape[2] // rows), -(-x.shape[3] // cols)
        if grid[0] * grid[1] + prefix == length:
            return grid, prefix
    raise ValueError(
        f"{type(model).__name__} attends among {length} tokens, and which of them are patches of a {x.shape[2]} x {x.shape[3]} "
        f"image is not known. Token reduction, for one, leaves fewer than there are patches."
    )
