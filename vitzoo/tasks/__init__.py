"""Training tasks on Lightning; not imported by ``import vitzoo``."""

from .classification import Classification
from .detection import Detection
from .segmentation import Segmentation

__all__ = ["Classification", "Detection", "Segmentation"]
