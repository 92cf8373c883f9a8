"""The families. Importing this package registers every model with timm."""

from vitzoo.layers import list_mixers
from vitzoo.models import (
    a2mamba,
    attnet,
    biformer,
    crossformer,
    cswin,
    dat,
    deit,
    davit,
    ffnet,
    glnet,
    gcvit,
    maxvit,
    nat,
    patchconvnet,
    pvt,
    smt,
    spectformer,
    swin,
    tap_adl,
    van,
    vit,
    twins,
)
from vitzoo.models._registry import (
    ModelInfo,
    create_model,
    list_families,
from vitzoo.models._accelerate import accelerate
    list_models,
    model_info,
)

# isort: split
from vitzoo.models import agent, flatten  # made of the hosts above

__all__ = [
    "ModelInfo",
    "a2mamba",
    "agent",
    "attnet",
    "biformer",
    "create_model",
    "accelerate",
    "crossformer",
    "cswin",
    "dat",
    "deit",
    "ffnet",
    "flatten",
    "glnet",
    "davit",
    "list_families",
    "list_mixers",
    "list_models",
    "gcvit",
    "maxvit",
    "model_info",
    "nat",
    "patchconvnet",
    "pvt",
    "smt",
    "spectformer",
    "swin",
    "tap_adl",
    "van",
    "vit",
]
    "twins",
