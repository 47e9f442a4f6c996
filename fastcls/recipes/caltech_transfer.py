"""Caltech-101 with a pre-trained VGG-16 of which only a new head trains.

The data root is that of torchvision's Caltech101, or any folder of class folders of photos.
"""

from dataclasses import dataclass
from pathlib import Path

from fastcls import config
from fastcls.data import Data, Input
from fastcls.errors import import_extra
from fastcls.folders import class_folders
from fastcls.models import TransferVgg

IMAGENET = Input(3, 224, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], resize=256)


@dataclass(kw_only=True)
class Config(config.Config):
    epochs: int = 30
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 0.001
    patience: int | None = 5
    weights: str = "default"
    workers: int = 2  # processes that read the images; the numbers do not depend on it


def load_data(settings: Config, root: Path) -> Data:
    return class_folders(
        photo_folder(root),
        settings,
        IMAGENET,
        fractions=(0.5, 0.25),
        transform=augmentation(),
        workers=settings.workers,
    )


def photo_folder(root: Path) -> Path:
    """The folder of the class folders: torchvision's below ``root``, else ``root`` itself."""
    if (root / "caltech101").is_dir():
        return root / "caltech101" / "101_ObjectCategories"
    inside = root / "101_ObjectCategories"  # where ``root`` is caltech101
    return inside if inside.is_dir() else root


def augmentation():
    """A random part, turned, recoloured, flipped: an RGB image of Pillow to uint8 [3, 224, 224]."""
    v2 = import_extra("torchvision.transforms.v2")
    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomRotation(15),
            v2.RandomResizedCrop(IMAGENET.size, scale=(0.8, 1.0), antialias=True),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05),
            v2.RandomHorizontalFlip(),
        ]
    )


def build_model(settings: Config, classes: int) -> TransferVgg:
    return TransferVgg(classes, settings.weights, settings.layers)
