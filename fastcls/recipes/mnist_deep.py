"""MNIST with three conv blocks, turned and shifted images, and a falling learning rate."""

from dataclasses import dataclass
from pathlib import Path

from fastcls import config
from fastcls.augment import RandomAffine
from fastcls.data import Data, in_memory
from fastcls.datasets import torchvision_set
from fastcls.models import MnistDeep


@dataclass(kw_only=True)
class Config(config.Config):
    epochs: int = 6
    batch_size: int = 64
    optimizer: str = "adam"
    lr: float = 0.001
    schedule: str = "step"
    degrees: float = 20.0  # of the random turns
    shift: float = 0.1  # of the random shifts, as part of the image's size


def load_data(settings: Config, root: Path) -> Data:
    return in_memory(
        *torchvision_set("MNIST", root),
        settings,
        mean=[0.5],
        std=[0.5],
        augment=RandomAffine(settings.degrees, settings.shift),
    )


def build_model(settings: Config, classes: int) -> MnistDeep:
    return MnistDeep(settings.layers)
