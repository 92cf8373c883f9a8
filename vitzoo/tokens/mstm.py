"""Multi-scale token mergence. Bian et al. 2023, arXiv:2306.04897.

Patches that the class token does not attend to are not thrown away: each goes into the crucial patch that it is most similar
to, and features of a coarser scale are fused in before the first of them goes.

Deviations: no code is published and only the abstract could be read, so the definition is ours: EViT's ranking and places;
cosine similarity of the tokens; means weighted by size, with proportional attention as in ToMe; the coarser scale is the 2x2
average of the patches, added through a linear layer that starts at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitzoo.layers import Linear
from vitzoo.ops import match
from vitzoo.tokens._map import TokenMap, complement, protect, rows
from vitzoo.tokens._method import Method, Step, log_size, register
from vitzoo.tokens._parts import QKV, attend_with_lse, class_attention
from vitzoo.tokens._schedule import check_layers, check_rate, pruning_layers
from vitzoo.tokens._state import State
from vitzoo.tokens.evit import attentive_tokens


@torch.no_grad()
def merge_into_crucial(x: Tensor, crucial: Tensor, prefix: int) -> TokenMap:
    """Every other patch goes into the crucial one that it is most similar to, by cosine.

    Args:
        x: tokens ``[B, L, C]``.
        crucial: patches that stay ``[B, K]``, counted without the prefix.
        prefix: tokens in front that take no part.

    Returns:
        The map to ``prefix + K`` tokens.
    """
    patches = F.normalize(x[:, prefix:], dim=-1)
    others = complement(crucial, patches.shape[1])
    _, host = match(rows(patches, others), rows(patches, crucial))
    return TokenMap(protect(crucial, prefix), others + prefix, host + prefix, x.shape[1])


@register("mstm")
@dataclass(eq=False)
class MultiScaleTokenMergence(Method):
    """Merge the patches that matter less into those that matter.

    Attributes:
        keep_rate: share of the patches that stays at each of ``layers``.
        layers: blocks that reduce; None: 3, 6, 9 of 12.
        multi_scale: fuse a coarser scale in front of the first of them.
    """

    NEEDS_CLASS: ClassVar[bool] = True

    keep_rate: float = 0.7
    layers: Sequence[int] | None = None
    multi_scale: bool = False

    def attach(self, model: Any) -> None:
        check_rate(self.keep_rate)
        layers = pruning_layers(self.depth) if self.layers is None else check_layers(self.layers, self.depth)
        self.where = frozenset(layers)
        if self.multi_scale:
            self.watch_grid(model)
            like = next(model.blocks.parameters())
            self.fusion = Linear(model.embed_dim, model.embed_dim).to(like.device, like.dtype)
            nn.init.zeros_(self.fusion.weight)
            nn.init.zeros_(self.fusion.bias)
            model.scale_fusion = self.fusion

    def detach(self, model: Any) -> None:
        if self.multi_scale:
            self.handle.remove()
            del model.scale_fusion

    def before(self, step: Step, state: State) -> State:
        if not self.multi_scale or step.layer != min(self.where):
            return state
        height, width = self.grid or (0, 0)
        prefix, patches = state.x[:, : self.prefix], state.x[:, self.prefix :]
        grid = patches.transpose(1, 2).unflatten(2, (height, width))
        coarse = F.avg_pool2d(grid, 2, ceil_mode=True, count_include_pad=False)
        coarse = F.interpolate(coarse, scale_factor=2, mode="nearest")[..., :height, :width]
        patches = patches + self.fusion(coarse.flatten(2).transpose(1, 2))
        return state._replace(x=torch.cat([prefix, patches], dim=1))

    def kept(self, state: State) -> int:
        """How many of the patches that are left stay."""
        return math.ceil(self.keep_rate * (state.x.shape[1] - self.prefix))

    def divides(self, step: Step, state: State) -> bool:
        shrinks = step.layer in self.where and self.kept(state) < state.x.shape[1] - self.prefix
        return shrinks or state.size is not None

    def weigh(self, step: Step, state: State, qkv: QKV) -> tuple[Tensor, QKV]:
        return attend_with_lse(qkv, log_size(state))

    def between(self, step: Step, state: State, qkv: QKV) -> State:
        if step.layer not in self.where:
            return state
        scores = class_attention(qkv, log_size(state)).mean(dim=1)[:, self.prefix :]
        tokens = merge_into_crucial(state.x, attentive_tokens(scores, self.kept(state)), self.prefix)
        x, size = tokens.average(state.x, state.size)
        return state.advance(tokens, x, follow=self.follow, size=size)
