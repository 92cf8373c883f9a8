"""What travels between the blocks of a reduced model, and what a forward may be asked to put aside of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitzoo.tokens._map import TokenMap, rows


class State(NamedTuple):
    """Tokens on their way through the blocks.

    Attributes:
        x: ``[B, L, C]``: prefix tokens, then what is left of the patches.
        patches: how many there were.
        size: ``[B, L]``: patches in each token; None: one in each.
        policy: ``[B, L]``: 1 for tokens that take part, 0 for those that are only still there; None: all do.
        source: ``[B, L0]``: the token that stands for each of the first ones, -1 for none; None: each for itself. Followed
            only where somebody asks for it.
        left: ``[B, L0, C]``: the last value of each of the first tokens that has no token any more.
        position: ``[B, L]``: which of the first tokens each comes from, -1 for a new one; for rotary positions.
        extra: what the method keeps for itself.
    """

    x: Tensor
    patches: int
    size: Tensor | None = None
    policy: Tensor | None = None
    source: Tensor | None = None
    left: Tensor | None = None
    position: Tensor | None = None
    extra: tuple[Any, ...] = ()

    def dense(self) -> Tensor:
        """A value for each of the first tokens: of what stands for it, or the last that it had itself: ``[B, L0, C]``."""
        if self.source is None:
            return self.x
        full = rows(self.x, self.source.clamp(min=0))
        return full if self.left is None else torch.where((self.source >= 0)[..., None], full, self.left)

    def advance(self, step: TokenMap, x: Tensor, *, follow: bool, alive: Tensor | None = None, **changes: Any) -> State:
        """The state after a reduction.

        Args:
            step: what became of the tokens.
            x: the new ones ``[B, M, C]``.
            follow: keep account of where each token went.
            alive: ``[B, M]``: places that hold a token; the others are padding.
            **changes: further new fields.

        Returns:
            The new state.
        """
        if not follow:
            return self._replace(x=x, **changes)
        source = step.source
        if alive is not None:
            there = torch.gather(alive, 1, source.clamp(min=0))
            source = torch.where((source >= 0) & there, source, -1)
        left = self.left
        if alive is not None or step.kept.shape[1] + step.moved.shape[1] < step.length:
            left = self.dense()
        if self.source is not None:
            source = torch.where(self.source >= 0, torch.gather(source, 1, self.source.clamp(min=0)), -1)
        position = step.kept if self.position is None else torch.gather(self.position, 1, step.kept)
        if step.made:
            position = torch.cat([position, position.new_full((position.shape[0], step.made), -1)], dim=1)
        return self._replace(x=x, source=source, left=left, position=position, **changes)


@dataclass
class Watch:
    """What a forward is asked to put aside: the dense tokens and the source after some blocks."""

    wanted: frozenset[int]
    last: int
    dense: dict[int, Tensor] = field(default_factory=dict)
    sources: dict[int, Tensor | None] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
