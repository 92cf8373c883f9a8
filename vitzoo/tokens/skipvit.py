"""SkipViT: a token-level skip connection. Ataiefard et al. 2024, arXiv:2401.15293.

Patches that the class token does not attend to leave at one block, wait at no cost, and come back at a later one, so that the
map is whole again. It is meant for training speed. No parameters.

Deviations: no code is published and the paper's abstract does not say where tokens leave and return, so these are ours: they
leave between attention and MLP of ``drop_layer``, by head-mean class attention, and return in front of ``return_layer``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vitzoo.tokens._map import keep_only, protect, rows
from vitzoo.tokens._method import Method, Step, log_size, register
from vitzoo.tokens._parts import QKV, attend_with_lse, class_attention
from vitzoo.tokens._schedule import check_layers, check_rate
from vitzoo.tokens._state import State
from vitzoo.tokens.evit import attentive_tokens


@register("skipvit")
@dataclass(eq=False)
class SkipViT(Method):
    """Let patches skip some blocks.

    Attributes:
        keep_rate: share of the patches that skips nothing (published: 0.45).
        drop_layer: block in which the others leave; None: a quarter of the way.
        return_layer: block in front of which they return; None: the last one.
        eval_skip: skip in evaluation too.
    """

    NEEDS_CLASS: ClassVar[bool] = True
    ALWAYS_FOLLOW: ClassVar[bool] = True

    keep_rate: float = 0.45
    drop_layer: int | None = None
    return_layer: int | None = None
    eval_skip: bool = True

    def attach(self, model: object) -> None:
        check_rate(self.keep_rate)
        first = self.depth // 4 if self.drop_layer is None else self.drop_layer
        last = self.depth - 1 if self.return_layer is None else self.return_layer
        if last == self.depth:
            check_layers((first,), self.depth)
        else:
            check_layers((first, last), self.depth)
        self.first, self.last = first, last

    def before(self, step: Step, state: State) -> State:
        if step.layer != self.last or state.source is None:
            return state
        return state._replace(x=state.dense(), source=None, left=None, position=None)

    def kept(self, patches: int) -> int:
        """How many of so many patches skip nothing."""
        return math.ceil(self.keep_rate * patches)

    def divides(self, step: Step, state: State) -> bool:
        if step.layer != self.first or self.first >= self.last:
            return False
        wanted = self.eval_skip or bool(step.parts.block.training)
        return wanted and self.kept(state.patches) < state.patches

    def weigh(self, step: Step, state: State, qkv: QKV) -> tuple[Tensor, QKV]:
        return attend_with_lse(qkv, log_size(state))

    def between(self, step: Step, state: State, qkv: QKV) -> State:
        scores = class_attention(qkv).mean(dim=1)[:, self.prefix :].detach()
        index = protect(attentive_tokens(scores, self.kept(state.patches)), self.prefix)
        return state.advance(keep_only(index, state.x.shape[1]), rows(state.x, index), follow=True)
