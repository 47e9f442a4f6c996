"""CIFAR-10 with three conv blocks; a fifth of the training images chooses the best epoch."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastcls import train
from fastcls.data import Data, in_memory, torchvision_set
from fastcls.models import CifarCnn


@dataclass(kw_only=True)
class Config(train.Config):
    epochs: int = 8
    batch_size: int = 20
    lr: float = 0.001
    val_fraction: float = 0.2


def load_data(config: Config, root: Path, device: torch.device) -> Data:
    return in_memory(
        *torchvision_set("CIFAR10", root),
        device,
        batch_size=config.batch_size,
        shuffle=config.shuffle,
        seed=config.seed,
        val_fraction=config.val_fraction,
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
    )


def build_model(config: Config) -> CifarCnn:
    return CifarCnn(config.layers)
