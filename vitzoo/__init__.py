"""vitzoo: vision-transformer backbones on shared 2-D attention ops.

``create_model`` builds any model of the zoo, and any of timm's; importing the package puts the zoo's models into timm's
registry, so that ``timm.create_model("nat_tiny")`` and everything built on timm knows them.
"""

from importlib.metadata import PackageNotFoundError, version

from vitzoo.models import ModelInfo, create_model, list_families, list_mixers, list_models, model_info

try:
    __version__ = version("vitzoo")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["ModelInfo", "__version__", "create_model", "list_families", "list_mixers", "list_models", "model_info"]
