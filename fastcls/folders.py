"""Class folders of photos: read, decoded and augmented by worker processes, batch by batch."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastcls.config import Config
from fastcls.data import Batches, Data, ImageSet, Input, shares_of, to_floats
from fastcls.errors import UserError, import_extra
from fastcls.signals import leave_stops_to_the_training

# Folders of these names hold class folders of their own, and are no classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def open_image(file: str | os.PathLike, draft: bool = False):
    """An image of Pillow, decoded and upright; ``draft`` makes it small where that is faster.

    Grey levels of 16 bits become 8 bits; Pillow's own conversion would cut them off at 255. What is
    transparent lies on white.

    Raises:
        UserError: the file is absent, no image, damaged, or its values have no known range (32-bit
            integers and floats); the message names it.
    """
    try:
        with import_extra("PIL.Image").open(file) as image:
            if draft:
                image.draft("RGB", (image.width // 8, image.height // 8))
            image.load()
            if image.mode in ("I", "F"):
                raise ValueError(f"its values (mode {image.mode}) have no known range; save 8 bits")
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value * (1 / 257)).convert("L")
                image.info.pop("transparency", None)  # a level of 16 bits
            image = import_extra("PIL.ImageOps").exif_transpose(image)  # as a viewer shows it
            clear = "A" in image.getbands() or "transparency" in image.info
            return _on_white(image) if clear else image
    except Exception as error:  # Pillow raises whatever its decoders trip over
        raise UserError(f"image {Path(file)} cannot be read: {error}") from error


def _on_white(image):
    """Pillow's own conversion would show what lies under the transparency, which is often black."""
    image = image.convert("RGBA")
    paper = import_extra("PIL.Image").new("RGBA", image.size, "white")
    paper.alpha_composite(image)
    return paper.convert("RGB")


def check_images(files: list[str]) -> None:
    """Decode every image once, JPEG at an eighth of its size: no run starts on damaged ones.

    Raises:
        UserError: an image is damaged; the message names it.
    """
    with ThreadPoolExecutor() as pool:  # Pillow's decoders let other threads run
        bar = import_extra("tqdm").tqdm(
            pool.map(lambda file: open_image(file, draft=True), files),
            "checking images",
            total=len(files),
            leave=False,
            disable=None,
        )
        for _ in bar:
            pass


class _Files(torch.utils.data.Dataset):
    """The prepared image of ``(epoch, index)``, whichever process asks for it."""

    def __init__(self, files: list[str], input: Input, transform, seed: int):
        self.files, self.input, self.transform, self.seed = files, input, transform, seed

    def __getitem__(self, item: tuple[int, int]) -> torch.Tensor:
        epoch, index = item
        image = open_image(self.files[index])
        if self.transform is None:
            return self.input.prepare(image)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.stream(epoch, index))
            return self.transform(image.convert("RGB"))

    def stream(self, epoch: int, index: int) -> int:
        """The seed of an image's own random numbers.

        Torch's generator takes 32 bits of it: up to a million images over 4294 epochs have numbers
        of their own, and an image in an epoch has others under every other ``seed``.
        """
        return ((self.seed * 1_000_003 + epoch) * 1_000_003 + index) % 2**32

    def batch(self, images: list[torch.Tensor]) -> torch.Tensor:
        """uint8 [B, C, size, size]; a process's part of a small batch may be empty."""
        if not images:
            size = self.input.size
            return torch.empty(0, self.input.channels, size, size, dtype=torch.uint8)
        return torch.utils.data.default_collate(images)


class FolderBatches(Batches):
    """Batches that worker processes read from image files, decode and augment.

    Args:
        files: N image files.
        labels ... input: as in :class:`Batches`.
        transform: from an RGB image of Pillow to uint8 [C, size, size], by torch's random numbers
            alone; None (default): ``input.prepare``.
        workers: processes; 0 reads in this one. Default 0.
        order: ``shuffle`` and ``seed``, as in :class:`Batches`.
    """

    def __init__(
        self,
        files: list[str],
        labels: torch.Tensor,
        batch_size: int,
        input: Input,
        *,
        transform=None,
        workers: int = 0,
        **order,
    ):
        super().__init__(labels, batch_size, input, **order)
        self.files = _Files(files, input, transform, self.seed)
        self.workers = workers

    def epoch(self, number: int = 0, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = range(len(self.labels))
        if self.shuffle:
            order = torch.randperm(len(self.labels), generator=self._generator(number)).tolist()
        chosen = [list(order[rows]) for rows in self._rows(start)]
        loader = torch.utils.data.DataLoader(
            self.files,
            batch_sampler=[[(number, index) for index in batch] for batch in chosen],
            num_workers=min(self.workers, len(chosen)),
            collate_fn=self.files.batch,
            worker_init_fn=leave_stops_to_the_training,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # or a number for each loader is drawn from torch's own
        )
        for batch, images in zip(chosen, loader, strict=True):
            images = images.to(self.device, non_blocking=True)
            labels = self.labels[batch].to(self.device, non_blocking=True)
            yield self._normalise(to_floats(images)), labels

    def first(self, count: int) -> ImageSet:
        images = [self.files[0, index] for index in range(min(count, len(self.labels)))]
        return ImageSet(torch.stack(images), self.labels[:count])


def _image_folder(folder: Path):
    """torchvision's ``ImageFolder`` of two classes or more."""
    mend = (
        "Point --data or FASTCLS_DATA at a folder of class folders, or at one that holds "
        "torchvision's caltech101/101_ObjectCategories"
    )
    try:
        found = import_extra("torchvision.datasets").ImageFolder(folder)
    except FileNotFoundError as error:
        reason = str(error).rstrip(".")
        raise UserError(
            f"{folder} must hold a folder of images for each class: {reason}. {mend}"
        ) from error
    names = ", ".join(found.classes)
    if len(found.classes) < 2:
        raise UserError(f"{folder} must hold two classes or more, got {names}. {mend}")
    if PARTS.issuperset(found.classes):
        raise UserError(
            f"{folder} must hold a folder of images for each class, got {names}: "
            "put the images of a class together, the parts are drawn at random"
        )
    return found


def class_folders(
    folder: Path,
    config: Config,
    input: Input,
    *,
    fractions: tuple[float, float],
    transform,
    workers: int,
) -> Data:
    """A folder of class folders of photos: parts of ``fractions`` to train and to validate, the
    rest to test, drawn at random by the seed.

    Args:
        transform: for the training images; the others get ``input.prepare``.

    Raises:
        UserError: the folder is absent or holds no two class folders with images, or an image is
            damaged; the message names it.
    """
    found = _image_folder(folder)
    files, labels = map(list, zip(*found.samples, strict=True))
    check_images(files)
    parts, shares = [], shares_of(len(files), fractions, config.seed)
    if not all(map(len, shares)):
        raise UserError(
            f"{folder} must hold images to train, validate and test with, got {len(files)} in all"
        )
    for part in shares:
        training = not parts
        parts.append(
            FolderBatches(
                [files[i] for i in part],
                torch.tensor(labels)[part],
                config.batch_size,
                input,
                transform=transform if training else None,
                workers=workers,
                shuffle=config.shuffle and training,
                seed=config.seed,
            )
        )
    train, val, test = parts
    return Data(train, test, found.classes, val)
