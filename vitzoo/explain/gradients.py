"""Relevance from attention and its gradients. Chefer et al. 2021, arXiv:2103.15679, rules 5 to 11; norms: Modarressi et al.
2022, arXiv:2205.03286.

A layer passes relevance on as far as its attention, times what the target gains from it, is positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.explain._record import recording
from vitzoo.explain._steps import follow, steps_of
from vitzoo.explain.maps import nothing_seen


def gained(weights: Tensor, gradient: Tensor) -> Tensor:
    """Equation 5: the mean over heads of ``relu(A * dy/dA)``; ``[B, N, L, S]`` twice to ``[B, L, S]``."""
    return (weights * gradient).clamp(min=0).mean(dim=-3)


def excess(relevance: Tensor) -> Tensor:
    """Equations 8 and 9: the identity, and what is beyond it with rows that sum to one; rows without any stay zero."""
    eye = torch.eye(relevance.shape[-1], dtype=relevance.dtype, device=relevance.device)
    beyond = relevance - eye
    sums = beyond.sum(dim=-1, keepdim=True)
    return torch.where(sums == 0, torch.zeros_like(beyond), beyond / sums) + eye


def through_self(relevance: Tensor, cam: Tensor, crossed: Tensor | None = None) -> Any:
    """Equations 6 and 7: self-attention; ``R + cam R``, and the same of what has crossed over from other tokens.

    Args:
        relevance: ``[..., L, L]`` among the tokens themselves.
        cam: ``[..., L, L]``, see ``gained``.
        crossed: ``[..., L, S]`` from other tokens; None for none.

    Returns:
        The new relevance, or the pair of both.
    """
    own = relevance + cam @ relevance
    return own if crossed is None else (own, crossed + cam @ crossed)


def through_cross(queries: Tensor, keys: Tensor, crossed: Tensor, cam: Tensor) -> Tensor:
    """Equation 10: attention to other tokens; ``R_qk + R_qq'^T cam R_kk'`` with R' as ``excess`` makes it.

    Args:
        queries: ``[..., L, L]`` among the queries.
        keys: ``[..., S, S]`` among the keys.
        crossed: ``[..., L, S]`` so far.
        cam: ``[..., L, S]``.

    Returns:
        ``[..., L, S]``.
    """
    return crossed + excess(queries).transpose(-2, -1) @ (cam @ excess(keys))


def target_of(logits: Tensor, target: int | Tensor | None) -> Tensor:
    """A class for each image: the one given, or the likeliest.

    Args:
        logits: ``[B, classes]``.
        target: a class for all, ``[B]`` classes, or None.

    Returns:
        ``[B]`` classes.

    Raises:
        ValueError: a class that the model does not have, or another number of classes than images.
    """
    if target is None:
        return logits.argmax(dim=-1)
    classes = torch.as_tensor(target, device=logits.device).expand(len(logits)) if not isinstance(target, Tensor) else target
    if classes.shape != logits.shape[:1] or bool(((classes < 0) | (classes >= logits.shape[1])).any()):
        raise ValueError(f"target is one of {logits.shape[1]} classes for each of {len(logits)} images, got {target}.")
    return classes.to(logits.device)


def seen_with_gradients(model: Any, x: Tensor, target: int | Tensor | None) -> tuple[list, list[Tensor], list[Tensor]]:
    """Records, weights ``[B, N, L, S]`` and the gradients of each image's target logit with respect to them."""
    with torch.enable_grad(), recording(model, in_graph=True) as records:
        output = model(x.detach().requires_grad_())
    if not records:
        raise ValueError(nothing_seen(model))
    logits = output[0] if isinstance(output, tuple) else output
    chosen = logits.gather(1, target_of(logits, target)[:, None]).sum()  # images do not mix, so one backward is for all
    weights = [record.weights for record in records if record.weights is not None]  # in a graph all have them
    if not any(w.requires_grad for w in weights):
        raise ValueError(f"Nothing of {type(model).__name__} gives gradients. Do not call this on an exported or traced model.")
    gradients: Sequence[Tensor | None] = torch.autograd.grad(chosen, weights, allow_unused=True)
    filled = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    return records, [w.detach() for w in weights], filled


def relevance(model: nn.Module, x: Tensor, target: int | Tensor | None = None, *, start: int = 0) -> Tensor:
    """Chefer's relevance of the input tokens for a class: ``R <- R + cam R`` through all layers, read at the output.

    Pyramids are followed as the authors suggest: maps of windows as they lie on the map, and merging as a mean (see the top
    of ``vitzoo/explain/_steps.py``); they begin with the mean over the last map.

    Args:
        model: one whose attention is vitzoo's; in eval mode, since dropout would be part of the answer.
        x: images ``[B, C, H, W]``.
        target: a class for all, ``[B]`` classes, or None for the likeliest of each image.
        start: the first layer that counts.

    Returns:
        ``[B, h, w]`` on the map of the first layer that counts, not scaled.

    Raises:
        ValueError: no attention was called, a layer cannot be followed, or there is no such class.
    """
    records, weights, gradients = seen_with_gradients(model, x, target)
    steps = steps_of(model, x, records, weights, gained, gradients)[start:]
    if not steps:
        raise ValueError(f"start {start} leaves no layer.")
    return follow(model, steps, lambda row, matrix: row + row @ matrix)


def attention_gradcam(weights: Tensor, gradient: Tensor, prefix: int = 1) -> Tensor:
    """Grad-CAM on the class token's attention of one layer.

    Args:
        weights: ``[B, N, L, L]``.
        gradient: of the target with respect to them.
        prefix: tokens before the patches.

    Returns:
        ``[B, L - prefix]``: the mean over heads of attention times its mean gradient, where positive.
    """
    attention, gain = (t[:, :, 0, prefix:] for t in (weights, gradient))
    return (attention * gain.mean(dim=-1, keepdim=True)).mean(dim=1).clamp(min=0)


def norm_attribution(
    weights: Tensor, value: Tensor, project: Tensor, residual: Tensor, norms: list[tuple[Tensor, Tensor, float]]
) -> dict[str, Tensor]:
    """How much of a token's vector behind a post-norm layer each token brought: GlobEnc, sections 3.1 to 3.3.

    Args:
        weights: ``[B, N, L, L]``.
        value: value vectors ``[B, N, L, D]``.
        project: weight of the output projection, ``[C, N * D]``; its bias belongs to no token.
        residual: what the layer adds its output to, ``[B, L, C]``.
        norms: for each LayerNorm behind it, the first after attention and the second after the MLP: its weight ``[C]``, the
            vector that it normed, ``[B, L, C]``, and its epsilon. The MLP itself is passed by.

    Returns:
        ``[B, L, L]`` norms, receiving tokens in rows: "weighted" of each head's share ``[B, N, L, L]``, "summed" over
        heads, "residual" with the residual on the diagonal, "norm/0", "norm/1" behind each LayerNorm.
    """
    _, heads, length, depth = value.shape
    transformed = torch.einsum("bnld,cnd->bnlc", value, project.unflatten(1, (heads, depth)))
    summed = torch.einsum("bnij,bnjc->bijc", weights, transformed)
    eye = torch.eye(length, dtype=residual.dtype, device=residual.device)
    share = summed + eye[None, :, :, None] * residual[:, :, None]
    found = {
        "weighted": weights * transformed.norm(dim=-1)[:, :, None],
        "summed": summed.norm(dim=-1),
        "residual": share.norm(dim=-1),
    }
    for i, (weight, normed, eps) in enumerate(norms):
        spread = (normed.var(dim=-1, unbiased=False) + eps).sqrt()
        share = (share - share.mean(dim=-1, keepdim=True)) / spread[:, :, None, None] * weight
        found[f"norm/{i}"] = share.norm(dim=-1)
    return found
