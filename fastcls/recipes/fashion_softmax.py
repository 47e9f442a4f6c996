"""Fashion-MNIST with softmax regression: one linear layer and plain SGD."""

from dataclasses import dataclass
from pathlib import Path

from fastcls import config
from fastcls.data import Data, in_memory
from fastcls.datasets import torchvision_set
from fastcls.models import SoftmaxRegression

STRIP = 9  # test images in a row, titled with the true class over the predicted one


@dataclass(kw_only=True)
class Config(config.Config):
    epochs: int = 5
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.0


def load_data(settings: Config, root: Path) -> Data:
    return in_memory(*torchvision_set("FashionMNIST", root), settings)


def build_model(settings: Config, classes: int) -> SoftmaxRegression:
    return SoftmaxRegression()
