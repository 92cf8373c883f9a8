"""ATS: adaptive token sampling. Fayyaz et al. 2022, arXiv:2111.15667.

Inside the attention of the later blocks, patches are sampled by how much the class token takes from them (its attention
times the length of their value): equally spaced points on the cumulated scores pick the nearest patch, and patches picked
twice are kept once, so easy images keep fewer. Only the kept ones go on as queries, over all keys. No parameters.

Deviations: padding is masked by -inf among the keys instead of a softmax with epsilon (1e-6 apart); all prefix tokens are
protected; the order of kept patches is that of their scores and holds no meaning. As published, scores are counted from the
least one of an image, padding included, so what a later block samples can depend on the batch that an image is packed with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vitzoo.tokens._map import TokenMap, keep_only, protect
from vitzoo.tokens._method import Method, Step, register
from vitzoo.tokens._parts import QKV, class_attention, softmax_attend
from vitzoo.tokens._schedule import check_layers
from vitzoo.tokens._state import State


def significance(qkv: QKV, key_bias: Tensor | None = None) -> Tensor:
    """How much the class token takes from every token: attention summed over heads times value length, ``[B, L]``."""
    return class_attention(qkv, key_bias).sum(dim=1) * qkv.v.flatten(2).norm(dim=-1)


@torch.no_grad()
def sample_tokens(scores: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Inverse transform sampling without chance.

    Args:
        scores: ``[B, N]``, not negative; what is 0 is picked last.
        points: sample points M, as many as there were patches at first.

    Returns:
        Indices ``[B, N]``, the picked ones first and by rising score, and a mask ``[B, N]`` of those that were picked.
    """
    ranked, order = (scores / scores.sum(dim=1, keepdim=True)).sort(dim=1)
    total = ranked.cumsum(dim=1)
    low, high = total[:, :1], total[:, -1:]
    total = (total - low) / (high - low).clamp(min=torch.finfo(total.dtype).tiny)
    start = torch.where(total == 0, 1.0, total).amin(dim=1, keepdim=True)  # the smallest that is not zero
    i = torch.arange(points, device=scores.device, dtype=total.dtype)
    at = torch.linspace(0, 1, points, device=scores.device, dtype=total.dtype)
    wanted = start + (at * (points - 1) - start * i) / max(points - 1, 1)
    above = torch.searchsorted(total, wanted).clamp(max=total.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    nearer = (wanted - total.gather(1, below)).abs() <= (total.gather(1, above) - wanted).abs()
    picks = torch.where(nearer, below, above)
    picked = torch.zeros_like(total, dtype=torch.bool).scatter(1, picks, True)
    first = picked.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return order.gather(1, first), picked.gather(1, first)


@register("ats")
@dataclass(eq=False)
class ATS(Method):
    """Sample patches, another number for every image.

    Attributes:
        layers: blocks that sample; None: from a quarter of the depth on (3 to 11 of 12). None at all: ``()``.
        pack: shorten the batch to its longest image. Not while gradients are taken or a graph is captured: the length
            depends on the images.
    """

    NEEDS_CLASS: ClassVar[bool] = True

    layers: Sequence[int] | None = None
    pack: bool = True

    def attach(self, model: object) -> None:
        layers = range(max(1, self.depth // 4), self.depth) if self.layers is None else self.layers
        self.where = frozenset(check_layers(layers, self.depth))

    def divides(self, step: Step, state: State) -> bool:
        return step.layer in self.where or state.policy is not None

    def queries(self, step: Step, state: State, qkv: QKV) -> tuple[TokenMap, Tensor] | None:
        length, prefix = state.x.shape[1], self.prefix
        if step.layer not in self.where or length <= prefix + 1:
            return None
        scores = significance(qkv, _masked(state))[:, prefix:]
        index, picked = sample_tokens(scores, state.patches)
        if self.pack and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            longest = int(picked.sum(dim=1).max())
            index, picked = index[:, :longest], picked[:, :longest]
        alive = torch.cat([picked.new_ones(picked.shape[0], prefix), picked], dim=1)
        return keep_only(protect(index, prefix), length), alive

    def attend(self, step: Step, state: State, qkv: QKV) -> Tensor:
        return softmax_attend(qkv, _masked(state))

    def between(self, step: Step, state: State, qkv: QKV) -> State:
        return state if state.policy is None else state._replace(x=state.x * state.policy[..., None])

    def after(self, step: Step, state: State) -> State:
        return self.between(step, state, None)  # type: ignore[arg-type]  # it does not look at q, k, v


def _masked(state: State) -> Tensor | None:
    """-inf on the keys that are padding."""
    return None if state.policy is None else torch.where(state.policy > 0, 0.0, -torch.inf)
