"""Pictures for training and evaluation; not imported by ``import vitzoo``."""

from .errors import UserError
from .images import DigitImages, FolderImages, read_image
from .module import ImageData

__all__ = ["DigitImages", "FolderImages", "ImageData", "UserError", "read_image"]
