"""Exact softmax over the union of disjoint key sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_lse(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
    """The attention output over all keys together, from outputs over disjoint sets of keys.

        out = sum_i exp(lse_i - lse) out_i,    lse = log sum_i exp(lse_i)

    Args:
        outs: outputs `[..., D]`, each a softmax over its own keys (`return_lse=True` of `attend` and `attend2d`).
        lses: their log-sum-exps `[...]`, natural logarithm; -inf for an empty set.

    Returns:
        `[..., D]` in the dtype of the outputs, zero where every set is empty. Weights are computed in the dtype of lse (at
        least fp32). Differentiable in all arguments.

    Raises:
        ValueError: the two sequences differ in length or are empty, or a lse has not its output's shape without D.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge_lse needs one lse for each output, got {len(outs)} outputs and {len(lses)} lses.")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape[:-1] != lse.shape:
            raise ValueError(
                f"merge_lse got an output {list(out.shape)} with a lse {list(lse.shape)}: shapes must agree up to D."
            )
    stacked = torch.stack(list(lses))
    highest = stacked.detach().amax(0)
    weights = torch.exp(stacked - torch.where(highest == -torch.inf, 0.0, highest))
    total = weights.sum(0)
    weights = weights / torch.where(total == 0, 1.0, total)
    merged = sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True))
    return merged.to(outs[0].dtype)
