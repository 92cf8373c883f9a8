"""Training tasks on Lightning; not imported by ``import vitzoo``."""

from .classification import Classification

__all__ = ["Classification"]
