"""Which of other people's layers ours can stand in for, and the one function that puts ours in their place.

A layer of ours that computes what a layer of timm's computes, with our ops and at any size, is built from that layer and
takes over its parts, names and all, so that a checkpoint of the model loads as before. ``takes_the_place_of`` says so
beside its class; ``with_our_attention`` goes through a model and exchanges what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Layer = TypeVar("Layer", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {}
_ON_REQUEST: set[type[nn.Module]] = set()


def takes_the_place_of(*theirs: type[nn.Module], on_request: bool = False) -> Callable[[type[Layer]], type[Layer]]:
    """Decorate a class that is built from one layer of these classes and computes the same.

    Args:
        *theirs: the classes.
        on_request: only ``vitzoo.accelerate`` exchanges them. ``vitzoo.create_model`` leaves them in the models that it
            fetches from timm: other code, token reduction for one, knows them by class.

    Returns:
        The decorator.
    """

    def register(ours: type[Layer]) -> type[Layer]:
        for each in theirs:
            _OURS[each] = ours
        if on_request:
            _ON_REQUEST.update(theirs)
        return ours

    return register


def exchangeable() -> dict[type[nn.Module], type[nn.Module]]:
    """Their classes, and the class of ours that takes the place of each."""
    return dict(_OURS)


def with_our_attention(model: Any, on_request: bool = False) -> Any:
    """A model whose attention runs through our ops where it is of a kind that we have: equal outputs.

    Args:
        model: any module; layers of it whose class is exactly one of ``exchangeable()`` are exchanged in place, their
            parameters kept under their names. Subclasses are left alone: nobody knows what they changed. So is a layer
            whose ``refusal`` gives a reason.

        on_request: exchange those as well that are exchanged on request only.

    Returns:
        The model, or what takes its place where it is such a layer itself.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if _goes(child, on_request):
                setattr(parent, name, _OURS[type(child)](child))
    return _OURS[type(model)](model) if _goes(model, on_request) else model


def _goes(layer: nn.Module, on_request: bool) -> bool:
    kind = type(layer)
    return kind in _OURS and (on_request or kind not in _ON_REQUEST) and refusal(layer) is None


def refusal(theirs: nn.Module) -> str | None:
    """Why ours cannot stand in for a layer.

    Args:
        theirs: a layer of a class of ``exchangeable()``.

    Returns:
        The reason, in a sentence; None where ours can.

    Raises:
        KeyError: a class that nothing of ours stands in for.
    """
    for name, part in theirs.named_modules():
        if name.endswith("attn_drop") and getattr(part, "p", 0):
            return (
                f"its attention weights go through a dropout of {part.p}, and our ops never hold them. "
                "Build it with attn_drop_rate=0."
            )
    own: Any = getattr(_OURS[type(theirs)], "refuses", None)
    return None if own is None else own(theirs)
