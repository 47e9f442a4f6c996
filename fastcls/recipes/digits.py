"""scikit-learn's 8x8 handwritten digits: needs no download and trains in seconds."""

from dataclasses import dataclass
from pathlib import Path

from fastcls import config
from fastcls.data import Data, digits, in_memory
from fastcls.models import DigitsCnn


@dataclass(kw_only=True)
class Config(config.Config):
    epochs: int = 20
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float = 0.003
    schedule: str = "one-cycle"


def load_data(settings: Config, root: Path) -> Data:
    return in_memory(*digits(), settings, mean=[0.3], std=[0.4])


def build_model(settings: Config, classes: int) -> DigitsCnn:
    return DigitsCnn(settings.layers)
