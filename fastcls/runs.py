"""A run on disk: its folder, its checkpoints, and the whole way from a recipe to the pictures."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

import torch

from fastcls import recipes
from fastcls.data import data_root
from fastcls.errors import UserError, import_extra
from fastcls.train import Config, Trainer

# What a resumed run may change: how long and with which layers (they share all parameters).
CHANGEABLE = ("epochs", "layers")


class RunFolder:
    """The files of one run.

    ``config.json``: the recipe and its settings. ``metrics.jsonl``: one object per epoch.
    ``steps.jsonl``: one object per training step, ``step`` counting from 1. ``last.pt`` and
    ``best.pt``: checkpoints. ``curves.png`` and ``predictions.png``: pictures.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.steps = self.path / "steps.jsonl"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.curves = self.path / "curves.png"
        self.predictions = self.path / "predictions.png"

    def is_used(self) -> bool:
        return self.config.exists() or self.holds_results()

    def holds_results(self) -> bool:
        return self.last.exists() or self.metrics.exists()

    def write_config(self, recipe: str, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"recipe": recipe} | asdict(config), indent=2) + "\n"
        write_atomically(self.config, lambda path: path.write_text(text))

    def read_config(self) -> dict:
        try:
            return json.loads(self.config.read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no run to resume") from None
        except ValueError as error:
            raise UserError(f"{self.config} cannot be read: {error}") from error

    def keep_records(self, epochs: int, steps: int) -> None:
        """Drop what was recorded after the checkpoint that a resumed run starts from."""
        for file, count in ((self.metrics, epochs), (self.steps, steps)):
            if file.exists():
                kept = file.read_text().splitlines(keepends=True)[:count]
                write_atomically(file, lambda path, kept=kept: path.write_text("".join(kept)))


def append_records(file: Path, records: Iterable[dict]) -> None:
    with file.open("a") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)


def read_records(file: Path) -> list[dict]:
    """The objects of a ``.jsonl`` file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a new file and put it in place of ``file`` only when it is whole."""
    new = file.with_name(file.name + ".new")
    write(new)
    with new.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(new, file)


def save_checkpoint(file: Path, state: dict) -> None:
    write_atomically(file, lambda path: torch.save(state, path))


def load_checkpoint(file: Path, device: torch.device) -> dict:
    """Read a checkpoint's tensors and plain values; code in it is never run.

    Raises:
        UserError: the file is absent or damaged.
    """
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch raises whatever its reader trips over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"checkpoint {file} cannot be read: {reason}") from error


def configure(recipe: str, folder: RunFolder, resume: bool, changes: dict) -> Config:
    """The settings of a run: the recipe's, or those it began with, with ``changes`` made.

    Raises:
        UserError: the folder does not fit the wish to begin or to resume, or a resumed run
            is asked for settings it was not begun with.
    """
    config_type = recipes.get(recipe).Config
    if not resume:
        if folder.is_used():
            raise UserError(
                f"{folder.path} already holds a run: continue it with --resume, "
                "or choose another --out"
            )
        return config_type(**changes)
    begun = folder.read_config()
    if begun.pop("recipe", None) != recipe:
        raise UserError(f"{folder.path} holds a run of another recipe than {recipe}")
    for name, value in changes.items():
        if name not in CHANGEABLE and value != begun.get(name):
            raise UserError(
                f"a resumed run keeps its settings: {name} is {begun.get(name)}, not {value}"
            )
    known = {field.name for field in fields(config_type)}
    return config_type(**{k: v for k, v in (begun | changes).items() if k in known})


def run(
    recipe: str,
    out: str | os.PathLike,
    *,
    data: str | os.PathLike | None = None,
    device: str = "cpu",
    resume: bool = False,
    **changes,
) -> bool:
    """Train a recipe into the folder ``out``, with a progress bar and a table of the epochs.

    Args:
        recipe: a name out of ``recipes.names()``.
        out: the folder of the run; see :class:`RunFolder`.
        data: the folder of the data sets; default ``$FASTCLS_DATA``, else ~/.cache/fastcls.
        device: default ``"cpu"``.
        resume: continue the run in ``out`` to the numbers it would have come to uninterrupted.
        changes: settings that differ from the recipe's ``Config``.

    Returns:
        False if Ctrl-C broke it off; everything is saved then and ``resume`` continues it.

    Raises:
        UserError: something that the user can put right.
    """
    from fastcls import plots  # needs an extra: better known now than after the training

    import_extra("tqdm")
    folder, module, device = RunFolder(out), recipes.get(recipe), torch.device(device)
    config = configure(recipe, folder, resume, changes)
    trainer = Trainer(module, config, module.load_data(config, data_root(data), device), device)
    folder.write_config(recipe, config)
    if folder.holds_results():
        trainer.load_state_dict(load_checkpoint(folder.last, device))
        folder.keep_records(trainer.epoch, trainer.epoch * len(trainer.data.train))
    else:
        save_checkpoint(folder.last, trainer.state_dict())
    print(
        f"{recipe}: {config.layers} layers on {device}, {len(trainer.data.train.labels)} images "
        f"to train on, {len(trainer.data.test.labels)} to test with",
        flush=True,
    )
    finished = _train(trainer, folder)
    if finished:
        _conclude(trainer, folder, plots)
    else:
        print(f"stopped and saved; continue with: fastcls train {recipe} --resume --out {out}")
    return finished


def _train(trainer: Trainer, folder: RunFolder) -> bool:
    """Train all epochs that are left; False if Ctrl-C came."""
    train, epochs = trainer.data.train, trainer.config.epochs
    images = len(train.labels)
    bar = import_extra("tqdm").tqdm(
        total=epochs * images,
        initial=trainer.epoch * images + trainer.step * train.batch_size,
        unit=" images",
        unit_scale=True,
        disable=None,  # where nobody watches
    )
    with bar, ctrl_c() as stop:
        for metrics in trainer.history:
            _show(bar, metrics)
        while trainer.epoch < epochs:
            bar.set_description(f"epoch {trainer.epoch + 1}/{epochs}", refresh=False)
            if not trainer.train_epoch(stop, bar.update):
                save_checkpoint(folder.last, trainer.state_dict())
                return False
            _show(bar, _close_epoch(trainer, folder))
            if stop() and trainer.epoch < epochs:
                return False
    return True


def _show(bar, metrics: dict) -> None:
    """An epoch's row above the bar, and its main figures in the bar."""
    bar.write(table_row(metrics, header=metrics["epoch"] == 1))
    sys.stdout.flush()  # a log file shall grow by the epoch too
    bar.set_postfix(
        loss=f"{metrics['train_loss']:.4f}",
        test=f"{metrics['test_accuracy']:.2%}",
        refresh=False,
    )


def _close_epoch(trainer: Trainer, folder: RunFolder) -> dict:
    """Evaluate, record and save; the checkpoint comes last, so no record can be missing."""
    metrics, losses = trainer.finish_epoch()
    before = (trainer.epoch - 1) * len(losses)
    append_records(
        folder.steps,
        ({"step": before + i, "loss": loss} for i, loss in enumerate(losses, start=1)),
    )
    append_records(folder.metrics, [metrics])
    state = trainer.state_dict()
    if trainer.best_epoch() is metrics:
        save_checkpoint(folder.best, {k: state[k] for k in ("config", "model", "history")})
    save_checkpoint(folder.last, state)
    return metrics


def _conclude(trainer: Trainer, folder: RunFolder, plots) -> None:
    """Reload the best model, tell its test figures and draw the pictures."""
    best, test = trainer.best_epoch(), trainer.data.test
    trainer.model.load_state_dict(load_checkpoint(folder.best, trainer.device)["model"])
    losses = [record["loss"] for record in read_records(folder.steps)]
    plots.curves(trainer.history, losses, folder.curves)
    predicted = trainer.predict(test).argmax(1)
    plots.predictions(test.images, test.labels, predicted, trainer.data.classes, folder.predictions)
    hits = (predicted == test.labels).sum().item()
    chosen_by = "validation" if trainer.data.val is not None else "test"
    print(
        f"best epoch by {chosen_by} loss: {best['epoch']}\n"
        f"test loss {best['test_loss']:.4f}, "
        f"accuracy {hits / len(predicted):.2%} ({hits} of {len(predicted)})\n"
        f"files in {folder.path}"
    )


def table_row(metrics: dict, header: bool = False) -> str:
    """One epoch's figures in columns, below their names where ``header`` is true."""
    cells = {name.replace("_", " "): _cell(name, value) for name, value in metrics.items()}
    cells["images/s"] = cells.pop("images per second")
    row = "  ".join(f"{cell:>{len(name)}}" for name, cell in cells.items())
    return "  ".join(cells) + "\n" + row if header else row


def _cell(name: str, value: float) -> str:
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    if name.endswith("loss"):
        return f"{value:.4f}"
    return f"{value:.1f}" if name == "seconds" else f"{value:.0f}"


@contextlib.contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C only makes the yielded function return True; a second one interrupts.

    So the running step ends and what is saved belongs together.
    """
    presses = []

    def note(signum, frame):
        if presses:
            raise KeyboardInterrupt
        presses.append(signum)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main one
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, previous)
