"""CIFAR-10 with three conv blocks; a fifth of the training images chooses the best epoch."""

from dataclasses import dataclass
from pathlib import Path

from fastcls import config
from fastcls.data import Data, in_memory
from fastcls.datasets import torchvision_set
from fastcls.models import CifarCnn


@dataclass(kw_only=True)
class Config(config.Config):
    epochs: int = 8
    batch_size: int = 20
    lr: float = 0.001
    val_fraction: float = 0.2
    init: str = "he"


def load_data(settings: Config, root: Path) -> Data:
    return in_memory(
        *torchvision_set("CIFAR10", root),
        settings,
        val_fraction=settings.val_fraction,
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
    )


def build_model(settings: Config, classes: int) -> CifarCnn:
    return CifarCnn(settings.layers, settings.init)
