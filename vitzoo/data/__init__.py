"""Pictures for training and evaluation; not imported by ``import vitzoo``."""

from .detection import DetectionData
from .errors import UserError
from .images import DigitImages, FolderImages, read_image
from .module import ImageData
from .segmentation import SegmentationData

__all__ = ["DetectionData", "DigitImages", "FolderImages", "ImageData", "SegmentationData", "UserError", "read_image"]
