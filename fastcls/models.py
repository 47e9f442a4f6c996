"""The reference networks, each with fused or with native layers under one ``state_dict``.

Every network returns logits: the loss applies log-softmax, so ``forward`` must not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastcls import functional
from fastcls.errors import UserError, import_extra
from fastcls.fusing import fuse
from fastcls.modules import FusedConvBlock, FusedCrossEntropyLoss
from fastcls.reference import NativeConvBlock


class Layers(NamedTuple):
    """What exists fused and native: layers with the same parameters and initial values, and
    functions from logits and labels to the loss and the number of right predictions."""

    conv_block: type[nn.Conv2d]
    cross_entropy: type[nn.Module]
    cross_entropy_with_hits: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _native_cross_entropy_with_hits(logits, labels, **options):
    greatest, predicted = logits.detach().max(1)
    # As fused, a row with NaN is no hit: nothing equals its maximum.
    hits = ((predicted == labels) & (greatest == greatest)).sum()
    return nn.functional.cross_entropy(logits, labels, **options), hits


LAYERS = {
    "fused": Layers(FusedConvBlock, FusedCrossEntropyLoss, functional.cross_entropy_with_hits),
    "native": Layers(NativeConvBlock, nn.CrossEntropyLoss, _native_cross_entropy_with_hits),
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


def _he_normal(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)


# The first values of the parameters.
INITS = {"he": _he_normal, "pytorch": lambda model: None}


class CifarCnn(nn.Module):
    """Three conv blocks and two linear layers for 32x32 colour images.

    Args:
        layers: ``"fused"`` (default) or ``"native"``.
        init: ``"he"`` (default), weights N(0, 2 / fan_in) and biases 0 (He et al., 2015,
            arXiv:1502.01852), or ``"pytorch"``, the layers' own.

    Shape: float images [N, 3, 32, 32] to logits [N, 10].

    Raises:
        UserError: an unknown ``init``.
    """

    def __init__(self, layers: str = "fused", init: str = "he"):
        super().__init__()
        if init not in INITS:
            raise UserError(f"init must be one of {', '.join(INITS)}; got {init!r}")
        block = LAYERS[layers].conv_block
        self.conv1 = block(3, 16, 3, padding=1)
        self.conv2 = block(16, 32, 3, padding=1)
        self.conv3 = block(32, 64, 3, padding=1)
        self.dropout1 = nn.Dropout(0.2)
        self.fc1 = nn.Linear(64 * 4 * 4, 200)
        self.dropout2 = nn.Dropout(0.2)
        self.fc2 = nn.Linear(200, 10)
        INITS[init](self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.conv2(self.conv1(images)))
        x = self.dropout1(x.flatten(1))
        x = self.dropout2(self.fc1(x).relu())
        return self.fc2(x)


class MnistDeep(nn.Module):
    """Three conv blocks, then a linear layer with dropout and batch normalisation, and another.

    Args:
        layers: ``"fused"`` (default) or ``"native"``.

    Shape: float images [N, 1, 28, 28] to logits [N, 10].
    """

    def __init__(self, layers: str = "fused"):
        super().__init__()
        block = LAYERS[layers].conv_block
        self.conv1 = block(1, 32, 3, padding=1)
        self.conv2 = block(32, 64, 3, padding=1)
        self.conv3 = block(64, 128, 3, padding=1)
        self.fc1 = nn.Linear(128 * 3 * 3, 768)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(768)
        self.fc2 = nn.Linear(768, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.conv2(self.conv1(images)))
        x = self.dropout(self.fc1(x.flatten(1)))
        return self.fc2(self.norm(x).relu())


class MnistMlp(nn.Module):
    """Three linear layers for 28x28 grey images; nothing in it is fused but the loss.

    Shape: float images [N, 1, 28, 28] to logits [N, 10].
    """

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 256)
        self.fc2 = nn.Linear(256, 64)
        self.fc3 = nn.Linear(64, 10)
        self.dropout = nn.Dropout(0.2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.fc1(images.flatten(1)).relu())
        x = self.dropout(self.fc2(x).relu())
        return self.fc3(x)


class SoftmaxRegression(nn.Module):
    """One linear layer, from weights that are N(0, 0.01²) and biases that are 0.

    Shape: float images [N, 1, 28, 28] to logits [N, 10].
    """

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(28 * 28, 10)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1))


class TransferVgg(nn.Module):
    """VGG-16 whose last layer is replaced by two new ones, the only ones that train.

    Args:
        classes: how many.
        weights: ``"none"``, random; ``"default"``, trained on ImageNet, which torchvision
            downloads; or a file with the state dict of torchvision's VGG-16.
        layers: ``"fused"`` (default) or ``"native"``.

    Shape: float images [N, 3, 224, 224] to logits [N, classes].

    Raises:
        UserError: the weights are not to be had, or are of another network.
    """

    def __init__(self, classes: int, weights: str = "none", layers: str = "fused"):
        super().__init__()
        vgg = _load_vgg(weights).requires_grad_(False)
        self.features = fuse(vgg.features) if layers == "fused" else vgg.features
        self.pool = vgg.avgpool
        self.frozen = vgg.classifier[:-1]
        self.head = nn.Sequential(
            nn.Linear(4096, 256), nn.ReLU(), nn.Dropout(0.4), nn.Linear(256, classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.frozen(self.pool(self.features(images)).flatten(1))
        return self.head(x)


def _load_vgg(weights: str) -> nn.Module:
    vgg16 = import_extra("torchvision.models").vgg16
    if weights == "none":
        return vgg16()
    try:
        if weights == "default":
            return vgg16(weights="DEFAULT")
        vgg = vgg16(init_weights=False)
        vgg.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # no network, no such file, no tensors in it, other tensors in it
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"the weights {weights!r} of VGG-16 cannot be had ({reason}); --weights takes "
            "default, which downloads them, none, or a file with torchvision's state dict"
        ) from error
    return vgg


class MnistSpeed(nn.Module):
    """Three small conv blocks and one linear layer for 28x28 grey images.

    Args:
        layers: ``"fused"`` (default) or ``"native"``.

    Shape: float images [N, 1, 28, 28] to logits [N, 10].
    """

    def __init__(self, layers: str = "fused"):
        super().__init__()
        block = LAYERS[layers].conv_block
        self.conv1 = block(1, 8, 3, padding=1)
        self.conv2 = block(8, 40, 3, padding=1)
        self.conv3 = block(40, 80, 3, padding=1)
        self.fc = nn.Linear(80 * 3 * 3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv3(self.conv2(self.conv1(images))).flatten(1))
