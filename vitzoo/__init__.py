"""vitzoo: vision-transformer backbones on shared 2-D attention ops.

``create_model`` builds any model of the zoo, and any of timm's; importing the package puts the zoo's models into timm's
registry, so that ``timm.create_model("nat_tiny")`` and everything built on timm knows them.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from vitzoo import models
from vitzoo.models import ModelInfo, accelerate, list_families, list_mixers, list_models, model_info
from vitzoo.models._catalogue import list_pretrained
from vitzoo.models._registry import checkpoints_of

if TYPE_CHECKING:
    from torch import nn

try:
    __version__ = version("vitzoo")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+unknown"


def create_model(
    model_name: str, pretrained: bool | str = False, *, token_reduction: str | dict[str, Any] | None = None, **kwargs: Any
) -> nn.Module:
    """Build a model by name: ours where we have the name, else timm's.

    Args:
        model_name: a name, optionally with a tag (``"swin_tiny_patch4_window7_224.ms_in22k"``).
        pretrained: load the published weights; a string names their tag.
        token_reduction: a method of ``vitzoo.tokens``, put into the model after its weights: its name, whose options are then
            keywords (``token_reduction="tome", r=13``), or a dict with the name and the options.
        **kwargs: see ``vitzoo.models.create_model``.

    Returns:
        The model.

    Raises:
        ValueError: as ``vitzoo.models.create_model`` and ``vitzoo.tokens.reduce``.
        TypeError: a keyword that neither the model nor the method has.
    """
    if token_reduction is None:
        return models.create_model(model_name, pretrained=pretrained, **kwargs)
    from vitzoo import tokens

    name, options = tokens.options_of(token_reduction, kwargs)
    return tokens.reduce(models.create_model(model_name, pretrained=pretrained, **kwargs), name, **options)


def __getattr__(name: str) -> Any:
    """``vitzoo.tokens``, ``heads`` and ``explain`` without an import of their own; they are loaded when first asked for."""
    if name in ("explain", "heads", "tokens"):
        return importlib.import_module(f"vitzoo.{name}")
    raise AttributeError(f"vitzoo has no attribute '{name}'.")


__all__ = [
    "ModelInfo",
    "__version__",
    "accelerate",
    "checkpoints_of",
    "create_model",
    "list_families",
    "list_mixers",
    "list_models",
    "list_pretrained",
    "model_info",
]
