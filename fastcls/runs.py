"""A run on disk: its folder, its checkpoints, and the whole way from a recipe to the pictures."""

import json
import math
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch

from fastcls import distributed, recipes
from fastcls.config import Config
from fastcls.data import Data
from fastcls.datasets import data_root
from fastcls.distributed import Share
from fastcls.errors import UserError, first_line, import_extra
from fastcls.files import (
    RESUMABLE,
    append_records,
    load_checkpoint,
    named_where_unwritten,
    read_records,
    save_checkpoint,
    write_atomically,
    write_json,
)
from fastcls.signals import stop_signals
from fastcls.summary import Outcome, table_row
from fastcls.train import Trainer

# What a resumed run may change: how long and with which layers (they share all parameters).
CHANGEABLE = ("epochs", "layers")


class RunFolder:
    """The files of one run.

    ``config.json``: the recipe and its settings. ``metrics.jsonl``: one object per epoch.
    ``steps.jsonl``: one object per training step, ``step`` counting from 1. ``last.pt`` and
    ``best.pt``: checkpoints. ``summary.json``: the figures of the best model on the test images.
    The rest are pictures.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.steps = self.path / "steps.jsonl"
        self.last = self.path / "last.pt"
        self.best = self.path / "best.pt"
        self.summary = self.path / "summary.json"

    def is_used(self) -> bool:
        return self.config.exists() or self.holds_results()

    def holds_results(self) -> bool:
        return self.last.exists() or self.metrics.exists()

    def write_config(self, recipe: str, config: Config) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.config, {"recipe": recipe} | asdict(config))

    def read_config(self) -> dict:
        try:
            config = json.loads(self.config.read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no run to resume") from None
        except ValueError as error:
            raise UserError(f"{self.config} cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{self.config} cannot be read: it holds no settings")
        return config

    def keep_records(self, epochs: int, steps: int) -> None:
        """Drop what was recorded after the checkpoint that a resumed run starts from."""
        for file, count in ((self.metrics, epochs), (self.steps, steps)):
            if file.exists():
                kept = file.read_bytes().splitlines(keepends=True)[:count]
                with named_where_unwritten(file, RESUMABLE):
                    write_atomically(file, lambda path, kept=kept: path.write_bytes(b"".join(kept)))


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
    try:
        return config_type(**{k: v for k, v in (begun | changes).items() if k in known})
    except TypeError as error:  # a setting of another type, or one is missing
        raise UserError(f"{folder.config} is damaged: {error}") from error


def run(
    recipe: str,
    out: str | os.PathLike,
    *,
    data: str | os.PathLike | None = None,
    device: str = "cpu",
    resume: bool = False,
    tensorboard: bool = False,
    **changes,
) -> bool:
    """Train a recipe into the folder ``out``, with a progress bar and a table of the epochs.

    Under ``torchrun`` the processes share each batch, and one of them writes and prints.

    Args:
        recipe: a name out of ``recipes.names()``.
        out: the folder of the run; see :class:`RunFolder`.
        data: the folder of the data sets; default ``$FASTCLS_DATA``, else ~/.cache/fastcls.
        device: default ``"cpu"``.
        resume: continue the run in ``out`` to the numbers it would have come to uninterrupted.
        tensorboard: write the figures of the epochs for TensorBoard too.
        changes: settings that differ from the recipe's ``Config``.

    Returns:
        False if Ctrl-C, SIGTERM or SIGHUP broke it off; everything is saved then and ``resume``
        continues it.

    Raises:
        UserError: something that the user can put right.
    """
    # Needed at the end: better known now than after the training.
    for extra in ("tqdm", "matplotlib"):
        import_extra(extra)
    if tensorboard:
        import_extra("tensorboard", "tensorboard")
    share, device = distributed.join(device)
    folder, module = RunFolder(out), recipes.get(recipe)
    config = configure(recipe, folder, resume, changes)
    loaded = _load_in_turn(module, config, data_root(data), share)
    say = print if share.rank == 0 else lambda text: None
    begun = folder.holds_results()
    finished = _run(Trainer(module, config, loaded, device, share, say, begun), folder, tensorboard)
    distributed.leave()
    return finished


def _run(trainer: Trainer, folder: RunFolder, tensorboard: bool) -> bool:
    recipe, config, share = trainer.recipe, trainer.config, trainer.share
    begun, writes = folder.holds_results(), share.rank == 0
    if begun:
        continue_run(trainer, folder)
    records = Records(folder, trainer, tensorboard) if writes else None
    state = trainer.state_dict()
    if writes:
        epochs_before = folder.read_config().get("epochs") if begun else config.epochs
        folder.write_config(recipe, config)
        if begun:
            folder.keep_records(trainer.epoch, trainer.epoch * len(trainer.data.train))
        else:
            save_checkpoint(folder.last, state)
        print(
            f"{recipe}: {config.layers} layers on {trainer.device}"
            f"{f' x {share.world}' if share.world > 1 else ''}, "
            f"{len(trainer.data.train.labels)} images to train on, "
            f"{len(trainer.data.test.labels)} to test with",
            flush=True,
        )
        if epochs_before != config.epochs and config.schedule != "constant":
            print(
                f"the {config.schedule} schedule spans {config.epochs} epochs now, {epochs_before} "
                f"before: the next learning rate is {trainer.lr():.2g}"
            )
    finished = _train(trainer, records)
    if writes and finished:
        _conclude(trainer, folder)
    elif writes:
        print(f"stopped and saved in {folder.path}")
    return finished


def continue_run(trainer: Trainer, folder: RunFolder) -> None:
    """Bring the trainer to where the run's last checkpoint is.

    Raises:
        UserError: the checkpoint is damaged, or of other settings than ``config.json`` tells.
    """
    state = load_checkpoint(folder.last, trainer.device)
    try:
        saved, told = (json.loads(json.dumps(c)) for c in (state["config"], asdict(trainer.config)))
        for name in told.keys() & saved.keys() - set(CHANGEABLE):
            if told[name] != saved[name]:
                raise UserError(
                    f"{folder.config} is damaged: {name} is {told[name]}, and {saved[name]} in "
                    f"the checkpoint {folder.last.name}"
                )
        trainer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder.last} is no checkpoint to continue from ({first_line(error)}): "
            "put the run's own one back, or begin a new run"
        ) from error
    if trainer.config.epochs < trainer.epoch:
        raise UserError(
            f"{folder.path} has {trainer.epoch} epochs already: epochs must be at least as many, "
            f"got {trainer.config.epochs}"
        )


def _load_in_turn(module, config: Config, root: Path, share: Share) -> Data:
    """The recipe's data; what is missing is downloaded by the first process alone."""
    if share.rank > 0:
        torch.distributed.barrier()
    loaded = module.load_data(config, root)
    if share.rank == 0 and share.world > 1:
        torch.distributed.barrier()
    return loaded


class Records:
    """Writes what a run computes to its folder."""

    def __init__(self, folder: RunFolder, trainer: Trainer, tensorboard: bool):
        self.folder, self.trainer, self.board = folder, trainer, None
        if tensorboard:
            writer = import_extra("torch.utils.tensorboard").SummaryWriter
            self.board = writer(folder.path, purge_step=trainer.epoch + 1)

    def epoch(self, metrics: dict, losses: list[float], state: dict) -> None:
        """Record an epoch and save; the checkpoint comes last, so no record can be missing."""
        before = (metrics["epoch"] - 1) * len(losses)
        append_records(
            self.folder.steps,
            ({"step": before + i, "loss": loss} for i, loss in enumerate(losses, start=1)),
        )
        append_records(self.folder.metrics, [metrics])
        if self.board is not None:
            for name, value in metrics.items():
                self.board.add_scalar(name, value, metrics["epoch"])
            self.board.flush()
        if self.trainer.best_epoch() is metrics:
            kept = ("recipe", "config", "classes", "input", "model", "history")
            save_checkpoint(self.folder.best, {name: state[name] for name in kept})
        save_checkpoint(self.folder.last, state)


def _train(trainer: Trainer, records: Records | None) -> bool:
    """Train all epochs that are left; False if a signal stopped it. Without ``records`` nothing is
    shown or written."""
    epochs, share = trainer.config.epochs, trainer.share
    with _Progress(trainer, shown=records is not None) as progress, stop_signals() as asked:
        # A process that stopped alone would leave the others waiting for its gradients.
        stop = asked if share.world == 1 else lambda: distributed.agreed(asked(), share)
        while not trainer.is_finished():
            progress.bar.set_description(f"epoch {trainer.epoch + 1}/{epochs}", refresh=False)
            if not trainer.train_epoch(stop, progress.update):
                state = trainer.state_dict()
                if records is not None:
                    save_checkpoint(records.folder.last, state)
                return False
            metrics, losses = trainer.finish_epoch()
            state = trainer.state_dict()
            if records is not None:
                records.epoch(metrics, losses, state)
            progress.show(metrics)
            if stop() and not trainer.is_finished():
                return False
    return True


class _Progress:
    """The bar of a run, with the table of its epochs above."""

    def __init__(self, trainer: Trainer, shown: bool):
        self.trainer, self.shown, self.next_loss = trainer, shown, 0.0
        self.warned = False
        train = trainer.data.train
        self.bar = import_extra("tqdm").tqdm(
            total=trainer.config.epochs * len(train.labels),
            initial=trainer.epoch * len(train.labels) + trainer.step * train.batch_size,
            unit=" images",
            unit_scale=True,
            disable=None if shown else True,  # None: where nobody watches
        )

    def __enter__(self) -> "_Progress":
        for metrics in self.trainer.history:
            self.show(metrics)
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def update(self, images: int) -> None:
        self.bar.update(images)
        # Reading the loss waits for the device: once a second, and only for who watches.
        if not self.bar.disable and time.monotonic() > self.next_loss:
            self.next_loss = time.monotonic() + 1
            self.bar.set_postfix_str(f"loss {self.trainer.recent_loss():.4f}", refresh=False)

    def show(self, metrics: dict) -> None:
        """An epoch's row above the bar."""
        if self.shown:
            self.bar.write(table_row(metrics, header=metrics["epoch"] == 1))
            self._warn(metrics["train_loss"])
            sys.stdout.flush()  # a log file shall grow by the epoch too

    def _warn(self, loss: float) -> None:
        if not (self.warned or math.isfinite(loss)):
            self.warned = True  # of all later epochs too
            self.bar.write(
                f"warning: training diverged, its loss is {loss}: begin again with a smaller --lr, "
                "or with --clip-norm"
            )


def _conclude(trainer: Trainer, folder: RunFolder) -> None:
    """Reload the best model, tell its test figures and draw the pictures."""
    from fastcls import plots  # matplotlib takes its time

    best, classes = trainer.best_epoch(), trainer.data.classes
    titles = [*classes, "NaN"]  # of predictions, where there are none too
    trainer.model.load_state_dict(load_checkpoint(folder.best, trainer.device)["model"])
    test = trainer.data.test.to(trainer.device)  # all of it in this process
    outcome = Outcome(*trainer.predict(test), trainer.data.train.labels, classes)
    write_json(folder.summary, {"best_epoch": best["epoch"], **outcome.figures()})
    losses = [record["loss"] for record in read_records(folder.steps)]
    plots.curves(trainer.history, losses, folder.path / "curves.png")
    images, truth = test.first(20)
    predicted = outcome.predicted[:20]
    plots.predictions(images, truth, predicted, titles, folder.path / "predictions.png")
    if strip := getattr(recipes.get(trainer.recipe), "STRIP", 0):
        part = (t[:strip] for t in (images, truth, predicted))
        plots.strip(*part, titles, folder.path / "strip.png")
    plots.confusion(outcome.confusion(), classes, folder.path / "confusion.png")
    plots.class_accuracy(outcome.per_class(), folder.path / "classes.png")
    chosen_by = "validation" if trainer.data.val is not None else "test"
    if trainer.epoch < trainer.config.epochs:
        print(f"stopped early: {trainer.config.patience} epochs without a better one")
    print(f"best epoch by {chosen_by} loss: {best['epoch']}")
    print(outcome.text())
    print(f"files in {folder.path}")
