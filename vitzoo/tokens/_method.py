"""What a way to reduce tokens can do in a block, the block with that in it, and the names of all methods."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from vitzoo.tokens._map import TokenMap, rows
from vitzoo.tokens._parts import QKV, Parts, softmax_attend
from vitzoo.tokens._state import State, Watch


class Step(NamedTuple):
    """A block's place in a reduced model."""

    parts: Parts
    method: Method
    layer: int
    prefix: int


@dataclass(eq=False)
class Method:
    """A way to reduce tokens: what it does before a block, in its attention, between attention and MLP, and after.

    A method overrides what it needs. Its fields are its options; learned parts are modules that ``attach`` puts into the
    model under the published names.
    """

    NEEDS_CLASS: ClassVar[bool] = False
    ALWAYS_FOLLOW: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.watch: Watch | None = None
        self.depth = self.prefix = 0
        self.rotary = False
        self.epoch: float | None = None
        self.noted: dict[str, Any] = {}
        self.grid: tuple[int, int] | None = None

    def watch_grid(self, model: Any) -> None:
        """Note rows and columns of patches of every image that goes into the model: ``self.grid``."""
        self.handle = model.patch_embed.register_forward_pre_hook(partial(_note_grid, self, model))

    @property
    def follow(self) -> bool:
        """Whether the source of every token is kept account of."""
        return self.ALWAYS_FOLLOW or self.rotary or self.watch is not None

    def attach(self, model: Any) -> None:
        """Look at the model, complain in one sentence (``NotReducibleError``), and add learned parts."""

    def detach(self, model: Any) -> None:
        """Take the learned parts out again."""

    def before(self, step: Step, state: State) -> State:
        """In front of a block."""
        return state

    def divides(self, step: Step, state: State) -> bool:
        """Whether this block must be taken apart; otherwise it runs as it is, to the bit."""
        raise NotImplementedError

    def mix(self, step: Step, state: State, rope: Tensor | None) -> State:
        """A divided block's attention and what follows it, up to the MLP."""
        parts = step.parts
        h = self.read(step, state.x)
        qkv = parts.project(h, rope)
        keys = state
        chosen = self.queries(step, state, qkv)
        if chosen is not None:
            tokens, alive = chosen
            x, policy = rows(state.x, tokens.kept), alive.to(state.x.dtype)
            state = state.advance(tokens, x, follow=self.follow, alive=alive, policy=policy)
            h, qkv = rows(h, tokens.kept), qkv._replace(q=rows(qkv.q, tokens.kept))
        out, qkv = self.weigh(step, keys, qkv)
        y = parts.output(out, h)
        return self.between(step, state._replace(x=parts.add(state.x, y)), qkv)

    def read(self, step: Step, x: Tensor) -> Tensor:
        """What the attention branch reads of the residual stream."""
        return step.parts.read(x)

    def attend(self, step: Step, state: State, qkv: QKV) -> Tensor:
        """Attention ``[B, L, N, D]`` over the tokens of ``state``, which are the keys."""
        return softmax_attend(qkv, log_size(state))

    def weigh(self, step: Step, state: State, qkv: QKV) -> tuple[Tensor, QKV]:
        """``attend``, and q, k, v with what ``between`` wants to know of it."""
        return self.attend(step, state, qkv), qkv

    def queries(self, step: Step, state: State, qkv: QKV) -> tuple[TokenMap, Tensor] | None:
        """Tokens that alone go on as queries, and which of the places are not padding; None: all do."""
        return None

    def between(self, step: Step, state: State, qkv: QKV) -> State:
        """After the attention's residual, before the MLP."""
        return state

    def after(self, step: Step, state: State) -> State:
        """Behind a block."""
        return state

    def finish(self, state: State) -> Tensor:
        """What the last block hands to the rest of the model."""
        return state.x

    def loss(self, model: Any, images: Tensor, labels: Tensor, logits: Tensor) -> Tensor | None:
        """What the method adds to a training step's loss."""
        return None


def log_size(state: State) -> Tensor | None:
    """The bias on the keys that makes a token of n patches count n times: log n, ``[B, L]``."""
    return None if state.size is None else state.size.log()


def grid_of(model: Any, x: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of an image ``[B, C, H, W]``."""
    size = x.shape[-2], x.shape[-1]
    if hasattr(model.patch_embed, "dynamic_feat_size"):
        return model.patch_embed.dynamic_feat_size(size)
    height, width = model.patch_embed.patch_size
    return (size[0] + height - 1) // height, (size[1] + width - 1) // width


def _note_grid(method: Method, model: Any, embed: nn.Module, given: tuple[Tensor, ...]) -> None:
    method.grid = grid_of(model, given[0])


@contextmanager
def watching(method: Method, wanted: Any, last: int) -> Iterator[Watch]:
    """Inside, a forward puts aside what the ``wanted`` blocks put out, and runs none behind ``last``."""
    method.watch = Watch(frozenset(wanted), last)
    try:
        yield method.watch
    finally:
        method.watch = None


# -- a block ------------------------------------------------------------------------------------------------------------


def run(
    step: Step, x: Tensor | State, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor | State:
    """The forward of a reduced block: a tensor goes into the first and comes out of the last, a ``State`` between."""
    if attn_mask is not None or is_causal:
        raise ValueError("a model with token reduction takes no attention mask: its tokens change from block to block.")
    method, block = step.method, step.parts.block
    state = x if isinstance(x, State) else State(x, x.shape[1] - step.prefix)
    watch = method.watch
    if watch is None or step.layer <= watch.last:
        state = method.before(step, state)
        turn = rope if rope is None else _rope_of(rope, state.position, step.prefix)
        if method.divides(step, state):
            state = method.mix(step, state, turn)
            state = state._replace(x=step.parts.feed(state.x))
        else:
            whole = type(block).forward
            state = state._replace(x=whole(block, state.x) if turn is None else whole(block, state.x, rope=turn))
        state = method.after(step, state)
        if watch is not None and step.layer in watch.wanted:
            watch.dense[step.layer], watch.sources[step.layer] = state.dense(), state.source
            watch.states[step.layer] = state
    return state if step.layer + 1 < method.depth else method.finish(state)


def _rope_of(rope: Tensor, position: Tensor | None, prefix: int) -> Tensor:
    """The rotary embeddings ``[..., P, E]`` (sines, then cosines) of the tokens that are left: ``[B, ..., M, E]``.

    A token without a position, such as EViT's fused one, is not turned.
    """
    if position is None:
        return rope
    at = position[:, prefix:] - prefix
    sine, cosine = rope[..., :1, :].chunk(2, -1)
    still = torch.cat([torch.zeros_like(sine), torch.ones_like(cosine)], dim=-1)
    table = torch.cat([rope, still], dim=-2)
    at = torch.where(at < 0, table.shape[-2] - 1, at)
    if table.ndim == 2:
        return table[at][:, None]
    if table.ndim == 3:  # by head
        table = table[None]
    table = table.expand(at.shape[0], *table.shape[1:])
    index = at[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[-1])
    return torch.gather(table, 2, index)


# -- names --------------------------------------------------------------------------------------------------------------

METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Any:
    """Class decorator: make a method known by name."""

    def known(cls: type[Method]) -> type[Method]:
        METHODS[name] = cls
        return cls

    return known
