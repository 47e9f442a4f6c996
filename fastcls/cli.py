"""The command line: ``fastcls train RECIPE`` and ``fastcls info``."""

import argparse
import sys
import time

import torch

from fastcls import build_info, recipes
from fastcls.errors import UserError
from fastcls.models import LAYERS
from fastcls.runs import run

# The options of ``train`` that are settings of a recipe: None stands for the recipe's default.
SETTINGS = ("layers", "amp", "epochs", "batch_size", "lr", "seed")


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as every other user error is."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a user error, 130 after Ctrl-C."""
    try:
        options = parser().parse_args(argv)
        return options.command(options)
    except (UserError, OSError) as error:
        print(f"fastcls: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastcls: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="fastcls", description="Train small image classifiers with fused layers.")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    train = commands.add_parser("train", help="train a recipe")
    train.set_defaults(command=_train)
    train.add_argument("recipe", metavar="RECIPE", help=", ".join(recipes.names()))
    add = train.add_argument
    add("--data", metavar="DIR", help="data sets (default: $FASTCLS_DATA, else ~/.cache/fastcls)")
    add("--out", metavar="DIR", help="folder of the run (default: runs/RECIPE-TIME)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--device", default="auto", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")
    add("--layers", choices=list(LAYERS), help="default: fused")
    add("--amp", action="store_true", default=None, help="float16 on CUDA, bfloat16 on the CPU")
    add("--epochs", type=int, metavar="N")
    add("--batch-size", type=int, metavar="N")
    add("--lr", type=float, metavar="X", help="learning rate")
    add("--seed", type=int, metavar="N", help="default: 0")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")

    info = commands.add_parser("info", help="tell what was built and what runs")
    info.set_defaults(command=_info)
    return top


def _train(options: argparse.Namespace) -> int:
    if options.resume and options.out is None:
        raise UserError("--resume needs --out DIR, the folder of the run to continue")
    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    changes = {name: getattr(options, name) for name in SETTINGS}
    finished = run(
        options.recipe,
        options.out or f"runs/{options.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
        data=options.data,
        device=pick_device(options.device, options.layers or "fused"),
        resume=options.resume,
        **{name: value for name, value in changes.items() if value is not None},
    )
    return 0 if finished else 130


def pick_device(name: str, layers: str) -> str:
    """Check a device's name; ``"auto"`` is CUDA where a GPU and the layers' kernels are there.

    Raises:
        UserError: there is no such device here, or no kernels for it.
    """
    gpus = torch.cuda.device_count()
    kernels = "loaded" if layers == "native" else build_info()["cuda_kernels"]
    if name == "auto":
        return "cuda" if gpus and kernels == "loaded" else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"--device {name}: torch finds {gpus} CUDA device(s)")
    if device.type == "cuda" and kernels != "loaded":
        raise UserError(f"fused layers cannot run on {name}: the CUDA kernels are {kernels}")
    return name


def _info(options: argparse.Namespace) -> int:
    info = build_info()
    width = max(map(len, info))
    for name, value in info.items():
        text = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
        print(f"{name:<{width}}  {text}")
    return 0
