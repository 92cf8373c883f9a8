"""The families. Importing this package registers every model with timm."""

from vitzoo.layers import list_mixers
from vitzoo.models import (
    a2mamba,
    alternet,
    attnet,
    biformer,
    crossformer,
    cswin,
    dat,
    davit,
    deit,
    ffnet,
    gcvit,
    glnet,
    maxvit,
    moh,
    nat,
    patchconvnet,
    pvt,
    smt,
    soft,
    spectformer,
    swin,
    tap_adl,
    twins,
    van,
    vit,
)
from vitzoo.models._accelerate import accelerate
from vitzoo.models._catalogue import ModelInfo, list_families, list_models, model_info
from vitzoo.models._registry import create_model

# isort: split
from vitzoo.models import agent, flatten  # made of the hosts above

__all__ = [
    "ModelInfo",
    "a2mamba",
    "accelerate",
    "agent",
    "alternet",
    "attnet",
    "biformer",
    "create_model",
    "crossformer",
    "cswin",
    "dat",
    "davit",
    "deit",
    "ffnet",
    "flatten",
    "gcvit",
    "glnet",
    "list_families",
    "list_mixers",
    "list_models",
    "maxvit",
    "model_info",
    "moh",
    "nat",
    "patchconvnet",
    "pvt",
    "smt",
    "soft",
    "spectformer",
    "swin",
    "tap_adl",
    "twins",
    "van",
    "vit",
]
