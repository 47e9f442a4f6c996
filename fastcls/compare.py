"""Native and fused layers trained side by side: from one seed, on one loader, taking turns."""

import math
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fastcls import build_info, recipes
from fastcls.config import Config
from fastcls.data import Data
from fastcls.datasets import data_root
from fastcls.errors import UserError, import_extra
from fastcls.files import write_json
from fastcls.train import Trainer

# Steps that a side takes before it is the other's turn: few, so that whatever slows the machine
# down slows both; more than one, so that the caches are its own for most of them.
TURN = 10
# Turns of each memory format before the faster one is chosen.
TRIAL_TURNS = 3


# One thread is timed by the processor time it gets, which leaves out what other processes take.
CLOCKS = {"processor": time.thread_time, "wall": time.perf_counter}


def clock_name(device: torch.device) -> str:
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    return "processor" if one_thread else "wall"


class Side:
    """A trainer with a random state of its own, so that two of them can take turns."""

    def __init__(self, recipe, config: Config, data: Data, device: torch.device):
        self.trainer = Trainer(recipe, config, data, device, tell=lambda text: None)
        # The trainer's choice is to be repeatable; native layers are to be fast.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
        self.losses: list[float] = []
        self.seconds: list[list[float]] = [[]]  # of each turn of each epoch
        self.evaluations: list[float] = []
        self.clock = CLOCKS[clock_name(device)]
        self._keep_random_state()

    def turn(self, steps: int) -> bool:
        """Take some steps; False at the end of the epoch."""
        end = self.trainer.step + steps
        self._set_random_state()
        start = self.clock()
        at_end = self.trainer.train_epoch(lambda: self.trainer.step >= end)  # waits for the device
        self.seconds[-1].append(self.clock() - start)
        self._keep_random_state()
        return not at_end

    def finish_epoch(self) -> None:
        start = self.clock()
        _, losses = self.trainer.finish_epoch()
        self.evaluations.append(self.clock() - start)
        self.losses += losses
        self.seconds.append([])

    def epoch_seconds(self) -> list[float]:
        """Of the training steps and their loading, without evaluation."""
        return [sum(turns) for turns in self.seconds if turns]

    def figures(self) -> dict:
        last = self.trainer.history[-1]
        return {
            "test_accuracy": last["test_accuracy"],
            "test_loss": last["test_loss"],
            "seconds": sum(self.epoch_seconds()),
            "evaluation_seconds": sum(self.evaluations),
            "epoch_seconds": self.epoch_seconds(),
        }

    def _keep_random_state(self) -> None:
        self.random = torch.get_rng_state()
        if self.trainer.device.type == "cuda":
            self.cuda_random = torch.cuda.get_rng_state(self.trainer.device)

    def _set_random_state(self) -> None:
        torch.set_rng_state(self.random)
        if self.trainer.device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda_random, self.trainer.device)


def take_turns(sides: list[Side], turns: float = math.inf) -> None:
    """Let the sides train to the end of the epoch, or for some turns; each goes first in turn."""
    order, going = list(sides), True
    while going and turns > 0:
        going = all([side.turn(TURN) for side in order])
        order.reverse()
        turns -= 1


def faster_format(recipe, config: Config, data: Data, device: torch.device) -> Config:
    """``config`` with the memory format in which a few steps take less time."""
    sides = [
        Side(recipe, replace(config, channels_last=flag), data, device) for flag in (False, True)
    ]
    if device.type == "cuda":
        # A whole epoch, in which cuDNN meets every shape of batch: it tries its kernels on each.
        take_turns(sides)
        for side in sides:
            side.finish_epoch()
    else:
        take_turns(sides, TRIAL_TURNS)
    # The first turn holds what is done once; the least time is the least disturbed.
    return min(sides, key=lambda side: min(side.seconds[0][1:] or side.seconds[0])).trainer.config


def compare(
    recipe: str,
    out: str | os.PathLike,
    *,
    seeds: int = 1,
    data: str | os.PathLike | None = None,
    device: str = "cpu",
    **changes,
) -> dict:
    """Train a recipe with native and with fused layers; print, draw and return the comparison.

    Both sides use the memory format, NCHW or channels-last, in which they are faster, and train all
    epochs.

    Args:
        recipe: a name out of ``recipes.names()``.
        out: the folder of ``compare.json`` and ``compare.png``; it must not hold them already.
        seeds: how many, from the setting ``seed`` on.
        data, device, changes: as of :func:`fastcls.runs.run`, but for ``patience``.

    Raises:
        UserError: something that the user can put right.
    """
    from fastcls import plots  # matplotlib takes its time

    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError("compare runs in one process: start it without torchrun")
    if changes.get("patience") is not None:
        raise UserError("compare takes no patience: both sides train all epochs")
    folder, module, device = Path(out), recipes.get(recipe), torch.device(device)
    if (folder / "compare.json").exists():
        raise UserError(f"{folder} already holds a comparison: choose another --out")
    config = replace(module.Config(**changes), patience=None)  # caltech-transfer has one
    root, rows, losses = data_root(data), [], None
    replace(config, seed=config.seed + seeds - 1)  # the last one's check
    bar = import_extra("tqdm").tqdm(total=seeds * config.epochs, unit=" epochs", disable=None)
    for seed in range(config.seed, config.seed + seeds):
        loaded = module.load_data(replace(config, seed=seed), root)
        if not rows:
            chosen = {
                layers: faster_format(module, replace(config, layers=layers), loaded, device)
                for layers in ("native", "fused")
            }
            folder.mkdir(parents=True, exist_ok=True)
            _tell(bar, _heading(recipe, chosen, device))
        sides = {
            name: Side(module, replace(settings, seed=seed), loaded, device)
            for name, settings in chosen.items()
        }
        for _ in range(config.epochs):
            take_turns(list(sides.values()))
            for side in sides.values():
                side.finish_epoch()
            bar.update()
        rows.append({"seed": seed} | {name: side.figures() for name, side in sides.items()})
        _tell(bar, _row(rows[-1]))
        losses = losses or {name: side.losses for name, side in sides.items()}
        # After each seed, so that a comparison broken off keeps those it has.
        result = {
            "recipe": recipe,
            "config": asdict(config),
            "channels_last": {name: c.channels_last for name, c in chosen.items()},
            "clock": clock_name(device),
            "machine": build_info(),
            "seeds": rows,
        }
        write_json(folder / "compare.json", result)
        plots.comparison(losses, [_ratios(row) for row in rows], folder / "compare.png")
    bar.close()
    print(_conclusion(rows) + f"\nfiles in {folder}")
    return result


def _tell(bar, text: str) -> None:
    bar.write(text)
    sys.stdout.flush()  # a log file shall grow by the seed


def _ratios(row: dict) -> list[float]:
    native, fused = (row[name]["epoch_seconds"] for name in ("native", "fused"))
    return [a / b for a, b in zip(native, fused, strict=True)]


def ratio(row: dict, evaluation: bool = False) -> float:
    """Native time / fused time of one seed, of training alone or with evaluation."""
    native, fused = (
        row[name]["seconds"] + evaluation * row[name]["evaluation_seconds"]
        for name in ("native", "fused")
    )
    return native / fused


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _heading(recipe: str, chosen: dict[str, Config], device: torch.device) -> str:
    formats = {False: "NCHW", True: "channels-last"}
    sides = ", ".join(f"{name} in {formats[c.channels_last]}" for name, c in chosen.items())
    return (
        f"{recipe} on {device}: {sides}; {clock_name(device)} time\n"
        "seed  native accuracy  fused accuracy  native s  fused s  ratio  with evaluation"
    )


def _row(row: dict) -> str:
    native, fused = row["native"], row["fused"]
    return (
        f"{row['seed']:>4}  {native['test_accuracy']:>15.2%}  {fused['test_accuracy']:>14.2%}"
        f"  {native['seconds']:>8.1f}  {fused['seconds']:>7.1f}  {ratio(row):>5.2f}"
        f"  {ratio(row, evaluation=True):>15.2f}"
    )


def _conclusion(rows: list[dict]) -> str:
    lines = []
    for name in ("native", "fused"):
        mean, spread = mean_and_spread([row[name]["test_accuracy"] for row in rows])
        lines.append(f"{name} test accuracy {mean:.2%} ± {spread:.2%}")
    for text, evaluation in (("training", False), ("training and evaluation", True)):
        mean, spread = mean_and_spread([ratio(row, evaluation) for row in rows])
        lines.append(f"{text}: native takes {mean:.2f} ± {spread:.2f} times as long as fused")
    return "\n".join(lines)
