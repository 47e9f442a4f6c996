"""MNIST with two convolutions and dropout, in the order of the files, without normalisation."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastcls import train
from fastcls.data import Data, in_memory, torchvision_set
from fastcls.models import MnistCnn


@dataclass(kw_only=True)
class Config(train.Config):
    epochs: int = 10
    batch_size: int = 512
    lr: float = 0.001
    shuffle: bool = False


def load_data(config: Config, root: Path, device: torch.device) -> Data:
    return in_memory(
        *torchvision_set("MNIST", root),
        device,
        batch_size=config.batch_size,
        shuffle=config.shuffle,
        seed=config.seed,
    )


def build_model(config: Config) -> MnistCnn:
    return MnistCnn(config.layers)
