"""MNIST with three linear layers and dropout, small batches and plain SGD."""

from dataclasses import dataclass
from pathlib import Path

from fastcls import config
from fastcls.data import Data, in_memory
from fastcls.datasets import torchvision_set
from fastcls.models import MnistMlp


@dataclass(kw_only=True)
class Config(config.Config):
    epochs: int = 30
    batch_size: int = 20
    lr: float = 0.01
    momentum: float = 0.0


def load_data(settings: Config, root: Path) -> Data:
    return in_memory(*torchvision_set("MNIST", root), settings)


def build_model(settings: Config, classes: int) -> MnistMlp:
    return MnistMlp()
