"""Labelled images as normalised batches, and the small sets that are held in memory as bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastcls.augment import RandomAffine
from fastcls.config import Config
from fastcls.distributed import ALONE, Share
from fastcls.errors import import_extra

# Evaluation keeps no activations, so small images go through in large batches whatever the
# training uses.
EVALUATION_BATCH = 512


class ImageSet(NamedTuple):
    """images: uint8 [N, C, H, W]; labels: int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Input:
    """What a model takes of an image.

    Args:
        channels: 1 (grey) or 3 (red, green, blue).
        size: height and width in pixels.
        mean, std: one number per channel; None (default) leaves values in 0..1.
        resize: the shorter side before the centre is cut out; None (default): ``size``.
    """

    channels: int
    size: int
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize: int | None = None

    def prepare(self, image) -> torch.Tensor:
        """An image of Pillow as uint8 [C, size, size]: resized, then its centre."""
        v2 = import_extra("torchvision.transforms.v2")
        x = v2.functional.pil_to_tensor(image.convert("L" if self.channels == 1 else "RGB"))
        if x.shape[1:] != (self.size, self.size):
            x = v2.functional.resize(x, [self.resize or self.size], antialias=True)
            x = v2.functional.center_crop(x, [self.size, self.size])
        return x


def to_floats(images: torch.Tensor) -> torch.Tensor:
    """uint8 as float32 in 0..1; in two passes, of which PyTorch vectorises both."""
    return images.float().div_(255)


class Batches:
    """A labelled image set cut into float32 batches on one device.

    Bytes become ``(image / 255 - mean) / std``, a whole batch at a time.

    Args:
        labels: int64 [N], N > 0.
        batch_size: images per batch; the last batch holds the rest.
        input: the size of the images, and how they are normalised.
        shuffle: a new order in every epoch. Default False.
        seed: order and augmentation are functions of ``seed`` and the epoch alone. Default 0.
    """

    def __init__(
        self,
        labels: torch.Tensor,
        batch_size: int,
        input: Input,
        *,
        shuffle: bool = False,
        seed: int = 0,
    ):
        self.labels, self.batch_size, self.input = labels, batch_size, input
        self.shuffle, self.seed = shuffle, seed
        self.to(torch.device("cpu"))

    def to(self, device: torch.device, share: Share = ALONE) -> "Batches":
        """Give batches on ``device`` from now on, and of each only this process's ``share``."""
        self.device, self.share = device, share
        self._mean, self._std = (
            None if values is None else torch.tensor(values, device=device).view(-1, 1, 1)
            for values in (self.input.mean, self.input.std)
        )
        return self

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.labels) // self.batch_size)

    def size(self, step: int) -> int:
        """Images in the batch at ``step`` of an epoch, over all processes."""
        return min(self.batch_size, len(self.labels) - step * self.batch_size)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (images float32 [B, C, H, W], labels int64 [B]) of epoch ``number``.

        ``start`` skips that many batches, to continue an epoch broken off in the middle.
        """
        raise NotImplementedError

    def first(self, count: int) -> ImageSet:
        """The first images of the set, as bytes."""
        raise NotImplementedError

    def _generator(self, number: int) -> torch.Generator:
        # On the CPU, so that every device sees the same order.
        return torch.Generator().manual_seed(self.seed * 1_000_003 + number)

    def _rows(self, start: int) -> Iterator[slice]:
        """This process's rows of each batch from ``start`` on."""
        for step in range(start, len(self)):
            first = step * self.batch_size
            yield self.share.rows(first, first + self.size(step))

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        """Floats in 0..1 normalised, in place."""
        if self._mean is not None:
            x.sub_(self._mean)
        if self._std is not None:
            x.div_(self._std)
        return x


class MemoryBatches(Batches):
    """Batches of images that lie in memory as bytes, on the device of the batches.

    Args:
        images: uint8 [N, C, H, W], N > 0.
        labels ... input: as in :class:`Batches`.
        augment: turns and shifts the images of each batch; default None.
        order: ``shuffle`` and ``seed``, as in :class:`Batches`.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        input: Input,
        *,
        augment: RandomAffine | None = None,
        **order,
    ):
        self.images, self.augment = images, augment
        super().__init__(labels, batch_size, input, **order)

    def to(self, device: torch.device, share: Share = ALONE) -> Batches:
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return super().to(device, share)

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, labels, count = self.images, self.labels, len(self.labels)
        generator = self._generator(number)
        order = drawn = None
        if self.shuffle:
            order = torch.randperm(count, generator=generator).to(self.device)
        if self.augment is not None:
            drawn = self.augment.draw(count, generator).to(self.device)
        for rows in self._rows(start):
            # index_select copies whole images, indexing with a tensor single bytes.
            chosen = images[rows] if order is None else images.index_select(0, order[rows])
            x = to_floats(chosen)
            if drawn is not None:
                x = self.augment(x, drawn[rows])
            yield self._normalise(x), labels[rows] if order is None else labels[order[rows]]

    def first(self, count: int) -> ImageSet:
        return ImageSet(self.images[:count].cpu(), self.labels[:count].cpu())


@dataclass
class Data:
    """The batches of one recipe; ``val`` is None where nothing is held out."""

    train: Batches
    test: Batches
    classes: list[str]
    val: Batches | None = None

    def to(self, device: torch.device, share: Share) -> "Data":
        for batches in (self.train, self.val, self.test):
            if batches is not None:
                batches.to(device, share)
        return self


def in_memory(
    train: ImageSet,
    test: ImageSet,
    classes: list[str],
    config: Config,
    *,
    val_fraction: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: RandomAffine | None = None,
) -> Data:
    """Cut the sets into batches as ``config`` says.

    A positive ``val_fraction`` holds out that part of ``train``, drawn at random by the seed;
    ``augment`` is for the training images alone.
    """
    _, channels, _, size = train.images.shape
    given = Input(channels, size, mean, std)
    val = None
    if val_fraction > 0:
        train, held_out = split(train, val_fraction, config.seed)
        val = MemoryBatches(*held_out, EVALUATION_BATCH, given)
    order = {"shuffle": config.shuffle, "seed": config.seed}
    return Data(
        train=MemoryBatches(*train, config.batch_size, given, augment=augment, **order),
        test=MemoryBatches(*test, EVALUATION_BATCH, given),
        classes=classes,
        val=val,
    )


def split(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split at random into (rest, held out), the second with ``fraction`` of the images."""
    held_out, rest = shares_of(len(images.labels), [fraction], seed)
    return tuple(ImageSet(*(t[part] for t in images)) for part in (rest, held_out))


def shares_of(count: int, fractions: Sequence[float], seed: int) -> list[torch.Tensor]:
    """0..count - 1 in a random order, cut into parts of these fractions and the rest."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    ends = [round(sum(fractions[: i + 1]) * count) for i in range(len(fractions))]
    return list(order.tensor_split(ends))


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
