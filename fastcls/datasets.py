"""The data sets on disk: where they are, how they get there, and whether they are whole."""

import contextlib
import io
import math
import os
import socket
import struct
from pathlib import Path

import torch

from fastcls.data import ImageSet
from fastcls.errors import UserError, import_extra

DEFAULT_ROOT = Path("~/.cache/fastcls")
# A download attempt on a machine whose network swallows packets must end in a message.
CONNECT_SECONDS = 20


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
    for file in _files(dataset, root):
        if reason := _damage(dataset, file):
            raise UserError(
                f"{name} in {root} is damaged: {file.name} ({reason}); remove that "
                "file and run again to download it, or pass another --data DIR"
            )
    parts = [dataset(root, train=train) for train in (True, False)]
    classes = [name.partition(" - ")[0] for name in parts[0].classes]  # MNIST has "7 - seven"
    train, test = map(_image_set, parts)
    for part, use in ((train, "train"), (test, "test")):
        if reason := _contradiction(part, len(classes)):
            raise UserError(
                f"{name} in {root} is damaged: {reason} to {use} with; remove its files and run "
                "again to download it, or pass another --data DIR"
            )
    return train, test, classes


def _contradiction(part: ImageSet, classes: int) -> str | None:
    """What does not go together in files of which each is whole, or None."""
    images, labels = map(len, part)
    if images != labels:
        return f"{images} images and {labels} labels"
    if not all(0 <= label < classes for label in part.labels.unique()):
        return "a label that is none of its classes is among those"
    return None


def _files(dataset: type, root: Path) -> list[Path]:
    """The files that ``dataset`` reads under ``root``."""
    if hasattr(dataset, "resources"):  # the MNIST family: unpacked idx files
        folder = root / dataset.__name__ / "raw"
        return [folder / Path(name).stem for name, _ in dataset.resources]
    batches = dataset.train_list + dataset.test_list  # the CIFAR family: pickled batches
    names = [name for name, _ in batches] + [dataset.meta["filename"]]
    return [root / dataset.base_folder / name for name in names]


def _damage(dataset: type, file: Path) -> str | None:
    """What is wrong with a file of ``dataset``, or None."""
    if hasattr(dataset, "resources"):
        with file.open("rb") as opened:
            head = opened.read(4)
            sizes = opened.read(4 * head[3]) if len(head) == 4 else b""
        if len(head) < 4 or head[:3] != b"\0\0\x08" or len(sizes) < 4 * head[3]:
            return "no idx file of bytes"
        shape = struct.unpack(f">{head[3]}I", sizes)
        expected = 4 + len(sizes) + math.prod(shape)
        size = file.stat().st_size
        if size != expected:
            return f"{size} bytes, expected {expected}"
        kind, rest = ("images", (28, 28)) if "idx3" in file.name else ("labels", ())
        return None if any(shape[:1]) and shape[1:] == rest else f"no {kind} of this data set"
    check = import_extra("torchvision.datasets.utils").check_integrity
    sums = dict(dataset.train_list + dataset.test_list)
    sums[dataset.meta["filename"]] = dataset.meta["md5"]
    return None if check(str(file), sums[file.name]) else "its checksum is not the data set's"


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
