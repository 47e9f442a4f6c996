"""Files that are written whole or not at all, and errors that name them."""

import contextlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from fastcls.errors import UserError, first_line

RESUMABLE = "; what was saved before is whole: make room and continue with --resume"


@contextlib.contextmanager
def named_where_unwritten(file: Path, advice: str = "") -> Iterator[None]:
    """Turn what the system raises while ``file`` is written into a message that names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = first_line(error)
        # torch's own writer has the system's reason where it opens the file, and nowhere else.
        if "inline_container" in reason or "iostream" in reason:
            reason = reason.partition("strerror: ")[2] or "the disk may be full"
        raise UserError(f"{file} cannot be written: {reason}{advice}") from error


def append_records(file: Path, records: Iterable[dict]) -> None:
    with named_where_unwritten(file, RESUMABLE), file.open("a") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def read_records(file: Path) -> list[dict]:
    """The objects of a ``.jsonl`` file.

    Raises:
        UserError: a line is damaged; the message names it.
    """
    records = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{file} cannot be read: line {number}: {error}") from error
    return records


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file and put it in place of ``file`` only when it is whole."""
    new = file.with_name(file.name + ".new")
    try:
        write(new)
        with new.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(new, file)
    except BaseException:
        new.unlink(missing_ok=True)  # on a full disk the rest of it would be in the way
        raise
    folder = os.open(file.parent, os.O_RDONLY)  # the new name must outlive a power cut too
    os.fsync(folder)
    os.close(folder)


def write_json(file: Path, content: dict) -> None:
    text = json.dumps(content, indent=2) + "\n"
    with named_where_unwritten(file):
        write_atomically(file, lambda path: path.write_text(text))


def save_checkpoint(file: Path, state: dict) -> None:
    """Write a checkpoint; the one before stays until the new one is whole.

    Raises:
        UserError: no room, or no permission.
    """
    with named_where_unwritten(file, RESUMABLE):
        write_atomically(file, lambda path: torch.save(state, path))


def load_checkpoint(file: Path, device: torch.device) -> dict:
    """Read a checkpoint's tensors and plain values; code in it is never run.

    Raises:
        UserError: the file is absent or damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever its reader trips over
        raise UserError(f"checkpoint {file} cannot be read: {first_line(error)}") from error
