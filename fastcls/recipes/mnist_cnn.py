"""MNIST with two convolutions and dropout, in the order of the files, without normalisation."""

from dataclasses import dataclass
from pathlib import Path

from fastcls import config
from fastcls.data import Data, in_memory
from fastcls.datasets import torchvision_set
from fastcls.models import MnistCnn


@dataclass(kw_only=True)
class Config(config.Config):
    epochs: int = 10
    batch_size: int = 512
    lr: float = 0.001
    shuffle: bool = False


def load_data(settings: Config, root: Path) -> Data:
    return in_memory(*torchvision_set("MNIST", root), settings)


def build_model(settings: Config, classes: int) -> MnistCnn:
    return MnistCnn(settings.layers)
