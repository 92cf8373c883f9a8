"""Token mixers by name: what stands in a block between its first norm and its residual, chosen apart from the host.

A host (a family on a trunk) describes the place in a ``Slot``; a mixer is built for it. Every mixer maps
``[B, H, W, C]`` to ``[B, H, W, C]``, so it fits every pyramid. Beside prefix tokens (the class token of a ViT) fits a
mixer that says ``prefix=True`` and has a second method, ``forward_tokens(x, height, width)`` on ``[B, P + H * W, C]``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitzoo.layers.attention import PatternAttention, TokenAttention
from vitzoo.patterns import Pattern, grid, halo, neighborhood, window


@dataclass(frozen=True)
class Slot:
    """The place that a mixer is built for, as its host describes it.

    Attributes:
        dim: channels C.
        num_heads: heads of the host's own attention there.
        map_size: rows and columns of the map at the host's image size; tables are learned at it, every size can be fed.
        stage: index of the stage (0 in a plain host).
        block: index of the block in its stage.
        prefix_tokens: tokens before the map's (class, distillation, registers); 0 in a pyramid.
        qkv_bias: whether the host's projections to q, k, v have a bias.
        proj_drop: dropout after the output projection.
        kv_ratio: by what factor, per axis, the host's own attention reduces the map that k and v come from (PVT).
        lepe: whether the host takes its positions from a depthwise 3x3 convolution of v (CSWin).
        packed: whether the host projects to q, k and v by one linear layer; PVT has one for q and one for k and v.
    """

    dim: int
    num_heads: int
    map_size: tuple[int, int]
    stage: int = 0
    block: int = 0
    prefix_tokens: int = 0
    qkv_bias: bool = True
    proj_drop: float = 0.0
    kv_ratio: int = 1
    lepe: bool = False
    packed: bool = True


@dataclass(frozen=True)
class Entry:
    """A registered mixer: how it is built, and whether it takes prefix tokens."""

    build: Callable[..., nn.Module]
    prefix: bool


_MIXERS: dict[str, Entry] = {}


def register_mixer(name: str, *, prefix: bool = False) -> Callable[[Any], Any]:
    """Class or function decorator: make ``build(slot, **options)`` known under a name.

    Args:
        name: what ``create_model(..., mixer=name)`` takes.
        prefix: the mixer has ``forward_tokens`` and so fits beside a class token.

    Returns:
        The decorator; it returns what it decorates.

    Raises:
        ValueError: the name is taken by another mixer.
    """

    def register(build: Any) -> Any:
        known = _MIXERS.get(name)
        if known is not None and known.build.__qualname__ != build.__qualname__:
            raise ValueError(f"There is a mixer '{name}' already ({known.build.__module__}). Choose another name.")
        _MIXERS[name] = Entry(build, prefix)
        return build

    return register


def list_mixers() -> list[str]:
    """Names of the registered mixers, sorted."""
    return sorted(_MIXERS)


def build_mixer(name: str, slot: Slot, options: Mapping[str, Any]) -> nn.Module:
    """The mixer of a name for a place.

    Args:
        name: a name of ``list_mixers()``.
        slot: the place.
        options: keywords of the mixer.

    Returns:
        A module from ``[B, H, W, C]`` to ``[B, H, W, C]``.

    Raises:
        ValueError: an unknown name, or a mixer that does not fit beside prefix tokens.
        TypeError: an option that the mixer does not have.
    """
    if name not in _MIXERS:
        near = difflib.get_close_matches(name, _MIXERS, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(list_mixers())}."
        raise ValueError(f"There is no mixer named '{name}'. {hint}")
    entry = _MIXERS[name]
    if slot.prefix_tokens and not entry.prefix:
        fitting = ", ".join(n for n, e in sorted(_MIXERS.items()) if e.prefix)
        raise ValueError(
            f"Mixer '{name}' attends on a map and has no place for the model's {slot.prefix_tokens} prefix token(s). "
            f"Build the model with class_token=False and global_pool='avg', or choose one of: {fitting}."
        )
    known = [p for p in inspect.signature(entry.build).parameters if p not in ("slot", "self")]
    for option in options:
        if option not in known:
            raise TypeError(f"Mixer '{name}' has no option '{option}'. It has: {', '.join(known) or 'none'}.")
    return entry.build(slot, **options)


MixerChoice = str | tuple[str, int] | None
"""A mixer's name, a name for the first n blocks (the others keep the host's own), or None for the host's own."""


def choose_mixer(choice: MixerChoice, block: int) -> str | None:
    """The name that ``choice`` gives a block; None for the host's own mixer."""
    if isinstance(choice, tuple):
        name, count = choice
        return name if block < count else None
    return choice


def check_mixers(choices: tuple[Any, ...], stages: int) -> None:
    """Raise ValueError unless there is one valid choice for every stage."""
    if len(choices) != stages:
        raise ValueError(f"mixer {choices} names {len(choices)} stages, the model has {stages}. Give one choice for each.")
    for choice in choices:
        pair_of = isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[0], str) and isinstance(choice[1], int)
        if not (choice is None or isinstance(choice, str) or pair_of):
            raise ValueError(f"A mixer is a name, (name, number of blocks) or None, got {choice!r}.")


def mixer_options(args: Mapping[str, Any] | tuple[tuple[str, Any], ...], place: int, places: int) -> dict[str, Any]:
    """A mixer's keywords at one stage (or block): a tuple with an entry for each place gives that place's entry."""
    return {
        name: value[place] if isinstance(value, tuple) and len(value) == places else value for name, value in dict(args).items()
    }


class OnTokens(nn.Module):
    """A mixer in a plain host: tokens ``[B, P + H * W, C]`` and their grid instead of a map."""

    def __init__(self, mixer: nn.Module, prefix_tokens: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.prefix_tokens = prefix_tokens

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.prefix_tokens:
            return self.mixer.forward_tokens(x, height, width)  # type: ignore[operator]  # a mixer with prefix=True has it
        return self.mixer(x.unflatten(1, (height, width))).flatten(1, 2)


# -- softmax attention along a pattern -----------------------------------------------------------------------------


def _along(slot: Slot, pattern: Pattern, **padding: tuple[int, int]) -> PatternAttention:
    return PatternAttention(slot.dim, slot.num_heads, pattern, qkv_bias=slot.qkv_bias, proj_drop=slot.proj_drop, **padding)


@register_mixer("window")
def window_attention(slot: Slot, *, size: int = 7, shift: bool = True) -> nn.Module:
    """Softmax attention in windows of ``size`` x ``size``, shifted by half in odd blocks (Swin)."""
    step = size // 2 if shift and slot.block % 2 else 0
    return _along(slot, window(size, shift=step, edge="cover"), pad_multiple=(size, size))


@register_mixer("grid")
def grid_attention(slot: Slot, *, size: int = 7) -> nn.Module:
    """Softmax attention among ``size`` x ``size`` tokens spread evenly over the map (MaxViT)."""
    return _along(slot, grid(size), pad_multiple=(size, size))


@register_mixer("neighborhood")
def neighborhood_attention(slot: Slot, *, size: int = 7, dilation: int = 1) -> nn.Module:
    """Softmax attention of every token to the ``size`` x ``size`` nearest, ``dilation`` apart (NAT, DiNAT)."""
    field = size * dilation
    return _along(slot, neighborhood(size, dilation=dilation), pad_minimum=(field, field))


@register_mixer("halo")
def halo_attention(slot: Slot, *, block: int = 8, reach: int = 3) -> nn.Module:
    """Softmax attention of every ``block`` x ``block`` tokens to themselves and ``reach`` tokens around (HaloNet)."""
    return _along(slot, halo(block, reach))


@register_mixer("global", prefix=True)
class GlobalAttention(TokenAttention):
    """Softmax attention among all tokens, without a position bias."""

    def __init__(self, slot: Slot) -> None:
        super().__init__(slot.dim, slot.num_heads, qkv_bias=slot.qkv_bias, proj_drop=slot.proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).view_as(x)

    def forward_tokens(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens ``[B, P + H * W, C]``, prefix tokens like all others."""
        del height, width
        return super().forward(x)
