"""The reference networks, each with fused or with native layers under one ``state_dict``.

Every network returns logits: the loss applies log-softmax, so ``forward`` must not.
"""

from typing import NamedTuple

import torch
from torch import nn

from fastcls.modules import FusedConvBlock, FusedCrossEntropyLoss
from fastcls.reference import NativeConvBlock


class Layers(NamedTuple):
    """The layers that exist fused and native, with the same parameters and initial values."""

    conv_block: type[nn.Conv2d]
    cross_entropy: type[nn.Module]


LAYERS = {
    "fused": Layers(FusedConvBlock, FusedCrossEntropyLoss),
    "native": Layers(NativeConvBlock, nn.CrossEntropyLoss),
}


class DigitsCnn(nn.Module):
    """Two conv blocks and two linear layers for 8x8 grey digits.

    Args:
        layers: ``"fused"`` (default) or ``"native"``.

    Shape: float images [N, 1, 8, 8] to logits [N, 10].
    """

    def __init__(self, layers: str = "fused"):
        super().__init__()
        block = LAYERS[layers].conv_block
        self.conv1 = block(1, 32, 3, padding=1)
        self.conv2 = block(32, 64, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(64 * 2 * 2, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(images))
        x = self.dropout(x.flatten(1))
        return self.fc2(self.fc1(x).relu())


class MnistCnn(nn.Module):
    """Two convolutions, one max-pool and two linear layers for 28x28 grey images.

    Args:
        layers: ``"fused"`` (default) or ``"native"``.

    Shape: float images [N, 1, 28, 28] to logits [N, 10].
    """

    def __init__(self, layers: str = "fused"):
        super().__init__()
        block = LAYERS[layers].conv_block
        self.conv1 = block(1, 32, 3, pool_size=None)
        self.conv2 = block(32, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.fc1 = nn.Linear(64 * 12 * 12, 128)
        self.dropout2 = nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.conv1(images))
        x = self.dropout1(x).flatten(1)
        x = self.dropout2(self.fc1(x).relu())
        return self.fc2(x)


class CifarCnn(nn.Module):
    """Three conv blocks and two linear layers for 32x32 colour images.

    Args:
        layers: ``"fused"`` (default) or ``"native"``.

    Shape: float images [N, 3, 32, 32] to logits [N, 10].
    """

    def __init__(self, layers: str = "fused"):
        super().__init__()
        block = LAYERS[layers].conv_block
        self.conv1 = block(3, 16, 3, padding=1)
        self.conv2 = block(16, 32, 3, padding=1)
        self.conv3 = block(32, 64, 3, padding=1)
        self.dropout1 = nn.Dropout(0.2)
        self.fc1 = nn.Linear(64 * 4 * 4, 200)
        self.dropout2 = nn.Dropout(0.2)
        self.fc2 = nn.Linear(200, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.conv2(self.conv1(images)))
        x = self.dropout1(x.flatten(1))
        x = self.dropout2(self.fc1(x).relu())
        return self.fc2(x)
