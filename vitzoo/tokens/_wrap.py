"""Token reduction put around the blocks of a model from outside, and taken off again.

Every block gets a forward of its own, on the instance: no class is changed, parameters and their names stay. Between the
blocks travels a ``State``, a tuple of tensors, so that nothing is kept on modules: recomputation in gradient checkpointing,
deepcopy, pickle, torch.compile and torch.export see plain inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

from timm.models import eva, vision_transformer
from torch import nn

from vitzoo.models._plain import Plain
from vitzoo.tokens._method import METHODS, Method, Step, run
from vitzoo.tokens._outputs import (
    backbone_of,
    extra_loss,
    forward_intermediates,
    is_reduced,
    prune_intermediate_layers,
    set_epoch,
)
from vitzoo.tokens._parts import NotReducibleError, Parts

OWN = (forward_intermediates, prune_intermediate_layers, extra_loss, set_epoch)
"""Methods that a reduced model has on the instance."""


def reduce(model: nn.Module, method: str | Method, **options: Any) -> nn.Module:
    """Put token reduction into a model, in place.

    Args:
        model: a ViT or DeiT of the zoo, timm's ``VisionTransformer`` or ``Eva``, or either with ``features_only``.
        method: a name of ``METHODS`` ("tome", "evit", ...), or a method built before.
        **options: options of the named method.

    Returns:
        The same model. Names in its state_dict stay; learned parts of a method add theirs. ``forward_features`` returns
        fewer tokens, ``forward_intermediates`` whole maps.

    Raises:
        ValueError: an unknown method, a model that cannot be reduced (and why), one that is reduced already.
        TypeError: an option that the method does not have.
    """
    target = backbone_of(model)
    if isinstance(method, str):
        if method not in METHODS:
            raise ValueError(f"there is no token reduction '{method}'. There are: {', '.join(sorted(METHODS))}.")
        name, method = method, METHODS[method](**options)
    else:
        name = type(method).__name__
        if options:
            raise TypeError(f"options {', '.join(options)} go to the method that is built by name, not to a built one.")
    if is_reduced(target):
        raise ValueError("the model is reduced already. vitzoo.tokens.restore(model) takes that off first.")
    try:
        parts = _parts_of(target)
        if method.NEEDS_CLASS and getattr(target, "cls_token", None) is None:
            raise NotReducibleError("it ranks patches by what the class token attends to, and this model has no class token")
        method.depth, method.prefix = len(target.blocks), int(target.num_prefix_tokens)
        method.rotary = getattr(target, "rope", None) is not None
        method.attach(target)
    except NotReducibleError as why:
        raise ValueError(f"{type(target).__name__} cannot be reduced by '{name}': {why}.") from None
    for i, (block, part) in enumerate(zip(target.blocks, parts, strict=True)):
        block.forward = partial(run, Step(part, method, i, method.prefix))
    target.token_reduction = method
    for own in OWN:
        setattr(target, own.__name__, partial(own, target))
    return model


def options_of(wanted: str | dict[str, Any], keywords: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A method's name and its options, from what ``create_model`` was given.

    Args:
        wanted: a name, or a dict with ``name`` and options.
        keywords: further keywords; those that are options of the named method are taken out.

    Returns:
        Name and options.

    Raises:
        ValueError: a dict without a name.
    """
    if not isinstance(wanted, str):
        options = dict(wanted)
        if "name" not in options:
            raise ValueError(f"token_reduction needs a name: {{'name': 'tome', ...}}. Got {wanted}.")
        return options.pop("name"), options
    known = {field.name for field in fields(METHODS[wanted])} if wanted in METHODS else set()
    return wanted, {key: keywords.pop(key) for key in list(keywords) if key in known}


def restore(model: nn.Module) -> nn.Module:
    """Take token reduction off a model, learned parts included; returns the model. One without is left as it is."""
    target = backbone_of(model)
    if is_reduced(target):
        target.token_reduction.detach(target)
        for block in target.blocks:
            del block.forward
        for name in ("token_reduction", *(own.__name__ for own in OWN)):
            delattr(target, name)
    return model


@contextmanager
def without_reduction(model: nn.Module) -> Iterator[None]:
    """Inside, a reduced model is as it was; behind, the same reduction is put in anew.

    Weights of the model without a reduction are loaded inside: the learned parts of the method, and a teacher that it copies
    from the model, then start from them. A model that is not reduced is left alone.
    """
    method = vars(backbone_of(model)).get("token_reduction")
    restore(model)
    try:
        yield
    finally:
        if method is not None:
            reduce(model, method)


_KNOWN = (vision_transformer.VisionTransformer.forward_features, eva.Eva.forward_features, Plain.forward_features)


def _parts_of(model: Any) -> list[Parts]:
    forward = getattr(type(model), "forward_features", None)
    if forward not in _KNOWN:
        if hasattr(model, "stages") or hasattr(model, "layers"):
            raise NotReducibleError("its windows and downsampling need the whole map; a plain transformer can lose tokens")
        raise NotReducibleError("it is no ViT of the zoo and does not run timm's VisionTransformer or Eva as published")
    if not len(model.blocks):
        raise NotReducibleError("it has no blocks")
    return [Parts(block) for block in model.blocks]
