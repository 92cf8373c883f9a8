"""Attention rollout and attention flow. Abnar and Zuidema 2020, arXiv:2005.00928.

Every layer passes on half of what a token is (the residual) and half of what it attends to. Rollout multiplies the layers;
flow takes their weights for the widths of pipes and asks how much can run from an input token to an output token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitzoo.explain._record import recording, weights_of
from vitzoo.explain._steps import follow, steps_of
from vitzoo.explain.maps import nothing_seen

FUSIONS = ("mean", "max", "min")


def fuse_heads(weights: Tensor, fusion: str = "mean", discard: float = 0.0) -> Tensor:
    """One matrix of all heads: ``[B, N, L, S]`` to ``[B, L, S]``.

    Args:
        weights: attention weights.
        fusion: "mean", "max" or "min" over the heads.
        discard: share of the weights of an image, the smallest, that are set to zero; never the very first one.

    Returns:
        ``[B, L, S]``.

    Raises:
        ValueError: another fusion, or a share outside of 0 to 1.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion is {', '.join(FUSIONS)}, got '{fusion}'.")
    if not 0 <= discard < 1:
        raise ValueError(f"discard is a share of at least 0 and below 1, got {discard}.")
    fused = weights.mean(dim=1) if fusion == "mean" else getattr(weights, f"a{fusion}")(dim=1)
    if not discard:
        return fused
    flat = fused.flatten(1)
    smallest = flat.topk(int(flat.shape[1] * discard), dim=-1, largest=False).indices
    kept = torch.ones_like(flat).scatter(1, smallest, 0.0)
    kept[:, 0] = 1
    return (flat * kept).view_as(fused)


def augmented(matrix: Tensor, residual: bool = True, by_column: bool = False) -> Tensor:
    """``(A + I)`` with rows that sum to one.

    Args:
        matrix: ``[..., L, L]``.
        residual: add the identity; without it the rows are only normalised.
        by_column: divide column j by the sum of row j, as jacobgil/vit-explain does: for parity with its pictures alone.

    Returns:
        ``[..., L, L]``.
    """
    if residual:
        matrix = matrix + torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    sums = matrix.sum(dim=-1)
    return matrix / (sums[..., None, :] if by_column else sums[..., None])


def rolled_out(layers: Sequence[Tensor], start: int = 0, residual: bool = True, by_column: bool = False) -> Tensor:
    """The product of layers of one width: what each output token draws from each input token.

    Args:
        layers: ``[B, L, L]`` of each layer, heads fused, the first layer first.
        start: the first layer that counts.
        residual: see ``augmented``; without it the layers are multiplied as they are.
        by_column: see ``augmented``.

    Returns:
        ``[B, L, L]``, output tokens in rows.
    """
    product = None
    for layer in layers[start:]:
        step = augmented(layer, by_column=by_column) if residual else layer
        product = step if product is None else step @ product
    if product is None:
        raise ValueError(f"start {start} leaves none of {len(layers)} layers.")
    return product


@torch.no_grad()
def rollout(model: nn.Module, x: Tensor, *, start: int = 0, fusion: str = "mean", discard: float = 0.0) -> Tensor:
    """Attention rollout of a model: what its class token, or the mean of its map, draws from each input token.

    Pyramids, windows, agents and reduced keys are followed too: see the top of ``vitzoo/explain/_steps.py``.

    Args:
        model: one whose attention is vitzoo's.
        x: images ``[B, C, H, W]``.
        start: the first layer that counts.
        fusion: of the heads: "mean", "max" or "min".
        discard: share of the smallest weights of every layer that are set to zero.

    Returns:
        ``[B, h, w]`` on the map of the first layer that counts; with the prefix tokens' share they sum to one.

    Raises:
        ValueError: no attention was called, or a layer cannot be followed; see also ``fuse_heads``.
    """
    with recording(model) as records:
        model(x)
    if not records:
        raise ValueError(nothing_seen(model))
    weights = [weights_of(record.op, record.call) for record in records]
    steps = steps_of(model, x, records, weights, lambda w: fuse_heads(w, fusion, discard))[start:]
    if not steps:
        raise ValueError(f"start {start} leaves no layer.")
    return follow(model, steps, lambda row, matrix: row @ augmented(matrix))


def max_flow(layers: Tensor, output: int, source: int) -> float:
    """What can run from one output token down to one input token, layers being pipes. Edmonds and Karp's algorithm.

    Args:
        layers: ``[K, L, L]``, the width of the pipe from token i behind a layer to token j before it.
        output: a token behind the last layer.
        source: a token before the first.

    Returns:
        The flow.
    """
    down = [layer.double().cpu().clone() for layer in layers.flip(0)]  # from the output on
    up = [torch.zeros_like(layer) for layer in down]
    depth, total = len(down), 0.0
    while True:
        came: dict[tuple[int, int], tuple[int, int]] = {(0, output): (0, output)}
        queue = [(0, output)]
        while queue and (depth, source) not in came:
            level, node = queue.pop(0)
            neighbours = []
            if level < depth:
                neighbours += [(level + 1, int(j)) for j in (down[level][node] > 1e-12).nonzero()]
            if level:
                neighbours += [(level - 1, int(j)) for j in (up[level - 1][:, node] > 1e-12).nonzero()]
            for place in neighbours:
                if place not in came:
                    came[place] = (level, node)
                    queue.append(place)
        if (depth, source) not in came:
            return total
        path = [(depth, source)]
        while path[-1] != (0, output):
            path.append(came[path[-1]])
        pairs = list(zip(path[1:], path, strict=False))
        width = min(float(down[a[0]][a[1], b[1]] if b[0] > a[0] else up[b[0]][b[1], a[1]]) for a, b in pairs)
        for a, b in pairs:
            level, (i, j), sign = (a[0], (a[1], b[1]), 1) if b[0] > a[0] else (b[0], (b[1], a[1]), -1)
            down[level][i, j] -= sign * width
            up[level][i, j] += sign * width
        total += width


def flows(layers: Tensor, outputs: Sequence[int] | None = None) -> Tensor:
    """The largest flow from output tokens to every input token.

    Args:
        layers: ``[K, L, L]`` of one image, augmented, the first layer first.
        outputs: which output tokens; None for all.

    Returns:
        ``[len(outputs), L]``; divided by its sum a row is the published output.
    """
    count = layers.shape[-1]
    rows = [[max_flow(layers, i, j) for j in range(count)] for i in (range(count) if outputs is None else outputs)]
    return torch.tensor(rows, dtype=layers.dtype)


@torch.no_grad()
def flow(model: nn.Module, x: Tensor, *, most_tokens: int = 65) -> Tensor:
    """Attention flow of a plain transformer, from its class token (or the mean over all patches) to the patches.

    One largest flow is computed for each pair of tokens, in minutes rather than seconds beyond a hundred tokens.

    Args:
        model: one whose layers all have the same tokens.
        x: images ``[B, C, H, W]``.
        most_tokens: refuse more tokens than these.

    Returns:
        ``[B, h, w]``; with the prefix tokens' share they sum to one.

    Raises:
        ValueError: no attention was called, tokens change from layer to layer, or there are too many of them.
    """
    with recording(model) as records:
        model(x)
    if not records:
        raise ValueError(nothing_seen(model))
    sizes = {record.call.q.shape[1:-2].numel() for record in records}
    if len(sizes) > 1:
        raise ValueError(f"Flow is for layers of the same tokens, {type(model).__name__} has {sorted(sizes)}. Take rollout.")
    if max(sizes) > most_tokens:
        raise ValueError(
            f"{max(sizes)} tokens make {max(sizes)} largest flows and more; at most {most_tokens} are taken. "
            "Take rollout, a smaller image, or a larger most_tokens and time."
        )
    weights = [weights_of(record.op, record.call) for record in records]
    steps = steps_of(model, x, records, weights, fuse_heads)
    layers = torch.stack([augmented(step.matrix) for step in steps], dim=1)  # [B, K, L, L]
    prefix, grid = steps[-1].prefix, steps[-1].grid
    classes = getattr(model, "global_pool", "token") == "token" and prefix > 0
    outputs = [0] if classes else list(range(prefix, layers.shape[-1]))
    rows = []
    for image in layers:
        raw = flows(image, outputs)
        rows.append((raw / raw.sum(dim=-1, keepdim=True)).mean(dim=0))
    return torch.stack(rows)[:, prefix:].unflatten(1, grid).to(x.device)
