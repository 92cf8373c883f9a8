"""What the zoo is measured against: timm's model with the same weights, and attention in plain, gathered PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers import PatternAttention
from vitzoo.models._registry import entry_of


def unfolded_neighborhood(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernel: int, dilation: int) -> Tensor:
    """Neighborhood attention as people write it without a kernel: unfold k and v, pick each query's window, softmax.

    Args:
        q: ``[B, H, W, N, D]``; k and v likewise.
        k: keys.
        v: values.
        bias: ``[N, 2 * kernel - 1, 2 * kernel - 1]``, key minus query.
        kernel: tokens on a side.
        dilation: steps between them.

    Returns:
        ``[B, H, W, N, D]``.
    """
    batch, height, width, heads, dim = q.shape

    def axis(n: int) -> tuple[Tensor, Tensor]:
        i = torch.arange(n)
        residue, m = i % dilation, i // dilation
        length = (n - residue + dilation - 1) // dilation
        start = torch.minimum((m - kernel // 2).clamp(min=0), length - kernel)
        return start * dilation + residue, start - m + kernel - 1

    (first_y, bias_y), (first_x, bias_x) = axis(height), axis(width)
    field = (kernel - 1) * dilation + 1

    def windows(t: Tensor) -> Tensor:
        view = t.unfold(1, field, 1).unfold(2, field, 1)[..., ::dilation, ::dilation]  # [B, H', W', N, D, K, K]
        return view[:, first_y[:, None], first_x[None, :]].flatten(-2)  # [B, H, W, N, D, K * K]

    logits = torch.einsum("bhwnd,bhwndk->bhwnk", q * dim**-0.5, windows(k))
    offsets = torch.arange(kernel)
    rows = (bias_y[:, None] + offsets)[:, None, :, None]
    cols = (bias_x[:, None] + offsets)[None, :, None, :]
    logits = logits + bias[:, rows, cols].flatten(-2).permute(1, 2, 0, 3)
    return torch.einsum("bhwnk,bhwndk->bhwnd", logits.softmax(-1), windows(v))


class _Unfolded(PatternAttention):
    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        span = self.pattern.rows.resolve(x.shape[1])
        return unfolded_neighborhood(q, k, v, self.rel_bias, span.size or 1, span.step or 1)


def baseline_of(name: str, model: nn.Module, img_size: int) -> tuple[str, nn.Module]:
    """A name for the baseline of a listed model, and the baseline with the same weights.

    timm's model where timm has it, otherwise the same model with its neighborhoods unfolded.

    Args:
        name: a listed name.
        model: that model, whose weights the baseline takes.
        img_size: pixels on a side that the baseline is built for.

    Returns:
        The baseline's name and the baseline.

    Raises:
        ValueError: there is neither.
    """
    entry = entry_of(name)
    if entry is not None and timm.is_model(entry.name) and entry.timm_name != entry.name:
        kwargs: dict[str, Any] = {"img_size": img_size} if img_size != 224 else {}
        theirs = timm.create_model(entry.name, **kwargs).eval()
        theirs.load_state_dict(_to_timm(model.state_dict(), theirs.state_dict()))
        return "timm", theirs
    unfolded = copy.deepcopy(model)
    found = [m for m in unfolded.modules() if type(m) is PatternAttention and m.pattern.rows.edge == "clamp"]
    if not found:
        raise ValueError(f"{name} has no baseline: timm does not have it, and it has no neighborhoods to unfold.")
    for module in found:
        module.__class__ = _Unfolded
    return "unfold", unfolded


def _to_timm(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our Swin, ViT or MaxViT weights under timm's names."""
    if any(".rel_pos." in key for key in theirs):
        return {key.replace("rel_bias", "rel_pos.relative_position_bias_table"): value for key, value in ours.items()}
    state = {}
    for key, value in ours.items():
        key = key.replace("stages.", "layers.").replace("stem.", "patch_embed.")
        if key.endswith("rel_bias"):
            key = key.replace("rel_bias", "relative_position_bias_table")
            value = value.flip(1, 2).permute(1, 2, 0).flatten(0, 1)
        if key in theirs and theirs[key].shape != value.shape:  # a table at another window, as timm shrinks it
            side = round(len(theirs[key]) ** 0.5)
            picture = value.T.unflatten(1, (round(len(value) ** 0.5),) * 2)[None]
            value = F.interpolate(picture, size=(side, side), mode="bicubic").flatten(2)[0].T
        state[key] = value
    return state
