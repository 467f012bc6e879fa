"""Images from a folder, zip or tar of files."""

from experiments.data.image_folder.dataset import ImageFolder

__all__ = ["ImageFolder"]
