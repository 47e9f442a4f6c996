"""scikit-learn's 8x8 handwritten digits: needs no download and trains in seconds."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastcls import train
from fastcls.data import Data, digits, in_memory
from fastcls.models import DigitsCnn


@dataclass(kw_only=True)
class Config(train.Config):
    epochs: int = 20
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float = 0.003
    schedule: str = "one-cycle"


def load_data(config: Config, root: Path, device: torch.device) -> Data:
    return in_memory(
        *digits(),
        device,
        batch_size=config.batch_size,
        shuffle=config.shuffle,
        seed=config.seed,
        mean=[0.3],
        std=[0.4],
    )


def build_model(config: Config) -> DigitsCnn:
    return DigitsCnn(config.layers)
