"""FasterVLM: pruning a finished encoder's output by class attention. Zhang et al. 2024, arXiv:2412.01818.

What the class token attends to in a late block says which patches a language model needs to see. The encoder runs whole; its
consumer gets fewer tokens. No parameters, no training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitzoo.tokens._map import rows
from vitzoo.tokens._parts import Parts, class_attention


def select_tokens(features: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``keep`` patches with the highest scores, in the order in which they stand in the image.

    Args:
        features: patches ``[B, N, C]``, without prefix tokens.
        scores: ``[B, N]``: the class token's attention, mean over heads. A tower without a class token has another score,
            such as the mean attention that a patch receives.
        keep: how many, at most N.

    Returns:
        Tokens ``[B, keep, C]``, their indices ``[B, keep]``, ascending, and a mask ``[B, N]``.

    Raises:
        ValueError: ``keep`` is not between 1 and N.
    """
    if not 1 <= keep <= features.shape[1]:
        raise ValueError(f"{keep} tokens of {features.shape[1]} were asked for. Give a number from 1 to {features.shape[1]}.")
    index = scores.topk(keep, dim=1).indices.sort(dim=1).values
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True)
    return rows(features, index), index, mask


def encode_and_select(model: nn.Module, images: Tensor, keep: int, select_layer: int = -2) -> tuple[Tensor, Tensor, Tensor]:
    """Run an encoder and keep the patches that its class token attends to.

    One more projection to q and k, and one query's product with the keys: no attention matrix.

    Args:
        model: a plain transformer with a class token, ours or timm's.
        images: ``[B, in_chans, H, W]``.
        keep: patches to keep.
        select_layer: the block whose output and attention are taken; -1 is the last, LLaVA takes -2.

    Returns:
        As ``select_tokens``; the tokens are that block's output, not normed, without prefix tokens.

    Raises:
        ValueError: there is no class token, the block has none before it, or ``keep`` does not fit.
    """
    tower: Any = model
    if getattr(tower, "cls_token", None) is None:
        raise ValueError(f"{type(model).__name__} has no class token whose attention could choose. Use select_tokens.")
    if getattr(tower, "rope", None) is not None:
        raise ValueError("positions are rotary, and q and k outside their block are not turned. Use select_tokens.")
    layer = range(len(tower.blocks))[select_layer]
    if layer == 0:
        raise ValueError("select_layer is the first block; what it reads is not an output. Choose a later one.")
    wanted = {"indices": [layer - 1, layer], "return_prefix_tokens": True, "output_fmt": "NLC"}
    given, chosen = tower.forward_intermediates(images, intermediates_only=True, stop_early=True, **wanted)
    parts, before = Parts(tower.blocks[layer]), torch.cat([given[1], given[0]], dim=1)
    scores = class_attention(parts.project(parts.read(before), None)).mean(dim=1)[:, given[1].shape[1] :]
    return select_tokens(chosen[0], scores, keep)
