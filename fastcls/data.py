"""Small image sets held in memory as bytes and handed out as normalised batches."""

import contextlib
import io
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastcls.errors import UserError, import_extra

DEFAULT_ROOT = Path("~/.cache/fastcls")
# Evaluation keeps no activations, so it can afford large batches whatever the training uses.
EVALUATION_BATCH = 512
# A download attempt on a machine whose network swallows packets must end in a message.
CONNECT_SECONDS = 20


class ImageSet(NamedTuple):
    """images: uint8 [N, C, H, W]; labels: int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor


class Batches:
    """A labelled image set on one device, cut into float32 batches on that device.

    Bytes become ``(image / 255 - mean) / std``, a whole batch at a time.

    Args:
        images: uint8 [N, C, H, W], N > 0.
        labels: int64 [N].
        batch_size: images per batch; the last batch holds the rest.
        mean, std: one number per channel; None (default) leaves values in 0..1.
        shuffle: a new order in every epoch. Default False.
        seed: the order is a function of ``seed`` and the epoch alone. Default 0.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.images, self.labels = images, labels
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.mean, self.std = (
            None if values is None else torch.tensor(values, device=images.device).view(-1, 1, 1)
            for values in (mean, std)
        )

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images float32 [B, C, H, W], labels int64 [B]) of epoch ``number``.

        ``start`` skips that many batches, to continue an epoch broken off in the middle.
        """
        images, labels = self.images, self.labels
        order = self._order(number) if self.shuffle else None
        for first in range(start * self.batch_size, len(labels), self.batch_size):
            chosen = slice(first, first + self.batch_size)
            if order is not None:
                chosen = order[chosen]
            yield self._normalise(images[chosen]), labels[chosen]

    def _order(self, number: int) -> torch.Tensor:
        # Drawn on the CPU so that every device sees the same order.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(len(self.labels), generator=generator).to(self.labels.device)

    def _normalise(self, images: torch.Tensor) -> torch.Tensor:
        x = images / 255
        if self.mean is not None:
            x.sub_(self.mean)
        if self.std is not None:
            x.div_(self.std)
        return x


@dataclass
class Data:
    """The batches of one recipe; ``val`` is None where nothing is held out."""

    train: Batches
    test: Batches
    classes: list[str]
    val: Batches | None = None


def in_memory(
    train: ImageSet,
    test: ImageSet,
    classes: list[str],
    device: torch.device,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    val_fraction: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Data:
    """Put the sets on ``device`` and cut them into batches.

    A positive ``val_fraction`` holds out that part of ``train``, drawn at random by ``seed``.
    """

    def batches(images: ImageSet, size: int, **order) -> Batches:
        on_device = (tensor.to(device) for tensor in images)
        return Batches(*on_device, size, mean=mean, std=std, **order)

    val = None
    if val_fraction > 0:
        train, held_out = split(train, val_fraction, seed)
        val = batches(held_out, EVALUATION_BATCH)
    return Data(
        train=batches(train, batch_size, shuffle=shuffle, seed=seed),
        test=batches(test, EVALUATION_BATCH),
        classes=classes,
        val=val,
    )


def split(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split at random into (rest, held out), the second with ``fraction`` of the images."""
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(seed))
    held_out, rest = order.tensor_split([round(fraction * len(order))])
    return tuple(ImageSet(*(t[part] for t in images)) for part in (rest, held_out))


def digits() -> tuple[ImageSet, ImageSet, list[str]]:
    """scikit-learn's bundled digits: (train, test, classes), 1437 and 360 images of 1x8x8.

    The split is stratified by class and always the same.

    Raises:
        UserError: scikit-learn is not installed.
    """
    pixels, labels = import_extra("sklearn.datasets").load_digits(return_X_y=True)
    # 17 grey levels, 0..16, are spread over the bytes 0..255.
    images = torch.from_numpy(pixels * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
    train, test = import_extra("sklearn.model_selection").train_test_split(
        range(len(labels)), test_size=0.2, stratify=labels, random_state=0
    )
    labels = torch.from_numpy(labels)
    train, test = (ImageSet(images[part], labels[part]) for part in (train, test))
    return train, test, [str(digit) for digit in range(10)]


def data_root(option: str | os.PathLike | None = None) -> Path:
    """The folder of the data sets: ``option``, else $FASTCLS_DATA, else ~/.cache/fastcls."""
    return Path(option or os.environ.get("FASTCLS_DATA") or DEFAULT_ROOT).expanduser()


def torchvision_set(name: str, root: Path) -> tuple[ImageSet, ImageSet, list[str]]:
    """A data set of torchvision from ``root``, downloaded to it if absent: (train, test, classes).

    Args:
        name: a class of ``torchvision.datasets`` that keeps its images in ``data``
            and its labels in ``targets``, such as ``"MNIST"`` or ``"CIFAR10"``.
        root: the folder that torchvision calls root.

    Raises:
        UserError: torchvision is not installed, the files are damaged, or they are
            neither there nor to be downloaded.
    """
    dataset = getattr(import_extra("torchvision.datasets"), name)
    missing = [path for path in _files(dataset, root) if not path.exists()]
    if missing:
        _download(dataset, root, missing)
    try:
        parts = [dataset(root, train=train) for train in (True, False)]
    except Exception as error:  # torchvision raises whatever its parser trips over
        raise UserError(
            f"{name} in {root} is damaged ({error or type(error).__name__}): "
            "remove its files there and run again to download them, or pass another --data DIR"
        ) from error
    classes = [name.partition(" - ")[0] for name in parts[0].classes]  # MNIST has "7 - seven"
    return *(_image_set(part) for part in parts), classes


def _files(dataset: type, root: Path) -> list[Path]:
    """The files that ``dataset`` reads under ``root``."""
    if hasattr(dataset, "resources"):  # the MNIST family: unpacked idx files
        folder = root / dataset.__name__ / "raw"
        return [folder / Path(url).stem for url, _ in dataset.resources]
    batches = dataset.train_list + dataset.test_list  # the CIFAR family: pickled batches
    names = [name for name, _ in batches] + [dataset.meta["filename"]]
    return [root / dataset.base_folder / name for name in names]


def _download(dataset: type, root: Path, missing: list[Path]) -> None:
    name = dataset.__name__
    new_folders = [folder for folder in missing[0].parents if not folder.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # a line for every mirror tried
            dataset(root, download=True)
    except Exception as error:  # no network, no such mirror, no write permission, bad checksum
        for folder in new_folders:
            with contextlib.suppress(OSError):  # never made, or holds a finished file
                folder.rmdir()
        raise UserError(
            f"{name} is missing: {len(missing)} of its files are not there, the first is "
            f"{missing[0]}, and the download failed ({' '.join(str(error).split())}). "
            "Two ways to get it: point --data or FASTCLS_DATA at a folder that "
            f"torchvision.datasets.{name} can read, or run again with a network "
            "and it is downloaded"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _image_set(part) -> ImageSet:
    images = torch.as_tensor(part.data)
    # Grey images come as [N, H, W], colour images as [N, H, W, C].
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return ImageSet(images.contiguous(), torch.as_tensor(part.targets))
