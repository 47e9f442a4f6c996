"""The command line: ``fastcls train``, ``compare``, ``predict``, ``filters`` and ``info``."""

import argparse
import os
import shlex
import shutil
import sys
import time
from dataclasses import fields

import torch

from fastcls import __version__, build_info, recipes
from fastcls.config import OPTIMIZERS, SCHEDULES
from fastcls.errors import UserError
from fastcls.info import kernel_resources
from fastcls.models import INITS, LAYERS
from fastcls.runs import RunFolder, run

# Options that are settings of a recipe, by the field of its Config; None stands for its default.
SETTINGS = {
    "layers": {"choices": list(LAYERS), "help": "default: fused"},
    "amp": {"action": "store_true", "help": "float16 on CUDA, bfloat16 on the CPU"},
    "epochs": {"type": int, "metavar": "N"},
    "batch_size": {"type": int, "metavar": "N", "help": "of all processes together"},
    "lr": {"type": float, "metavar": "X", "help": "learning rate"},
    "schedule": {"choices": list(SCHEDULES), "help": "of the learning rate"},
    "optimizer": {"choices": list(OPTIMIZERS)},
    "clip_norm": {"type": float, "metavar": "X", "help": "largest norm of the gradients"},
    "patience": {"type": int, "metavar": "N", "help": "stop after N epochs without a better one"},
    "weights": {"metavar": "W", "help": "of VGG-16: none, default (downloaded) or a file"},
    "init": {"choices": list(INITS), "help": "first values of the parameters of cifar-cnn"},
    "channels_last": {"action": "store_true", "help": "train in this memory format"},
    "cuda_graph": {"action": argparse.BooleanOptionalAction, "help": "default on CUDA: yes"},
    "seed": {"type": int, "metavar": "N", "help": "default: 0"},
}


DEVICES = "cpu, cuda, cuda:1 … (default: cuda if there is one)"


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, as every other user error is."""

    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 after a user error, 130 if stopped."""
    try:
        options = parser().parse_args(argv)
        return options.command(options)
    except (UserError, OSError) as error:
        # Each of torchrun's processes speaks for itself: the others may have met no error.
        process = f", process {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"fastcls{process}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastcls: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="fastcls", description="Train small image classifiers with fused layers.")
    top.add_argument("--version", action="version", version=f"fastcls {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    train = commands.add_parser("train", help="train a recipe")
    train.set_defaults(command=_train)
    _add_run(train, "folder of the run (default: runs/RECIPE-TIME)")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument("--tensorboard", action="store_true", help="write for TensorBoard too")
    for name, option in SETTINGS.items():
        train.add_argument(f"--{name.replace('_', '-')}", default=None, **option)

    compare = commands.add_parser("compare", help="train native and fused layers side by side")
    compare.set_defaults(command=_compare)
    _add_run(compare, "folder of the results (default: runs/compare-RECIPE-TIME)")
    compare.add_argument("--seeds", type=int, default=1, metavar="N", help="how many (default: 1)")
    for name, option in SETTINGS.items():
        if name not in ("layers", "channels_last", "patience"):
            compare.add_argument(f"--{name.replace('_', '-')}", default=None, **option)

    predict = commands.add_parser("predict", help="tell the likeliest classes of images")
    predict.set_defaults(command=_predict)
    predict.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a run")
    predict.add_argument("images", metavar="IMAGE", nargs="+")
    predict.add_argument("--out", metavar="FILE", default="predict.png", help="the picture")
    predict.add_argument(
        "--invert", action="store_true", help="swap black and white: MNIST is white on black"
    )
    predict.add_argument("--device", default="auto", help=DEVICES)

    filters = commands.add_parser("filters", help="draw what small filters make of a photo")
    filters.set_defaults(command=_filters)
    filters.add_argument("photo", metavar="PHOTO")
    filters.add_argument("--out", metavar="DIR", default="filters", help="default: filters")

    info = commands.add_parser("info", help="tell what was built and what runs")
    info.add_argument(
        "--kernels", action="store_true", help="registers and spills of the CUDA kernels too"
    )
    info.set_defaults(command=_info)
    return top


def _add_run(command: argparse.ArgumentParser, out: str) -> None:
    """The options of all commands that train."""
    add = command.add_argument
    add("recipe", metavar="RECIPE", help=", ".join(recipes.names()))
    add("--data", metavar="DIR", help="data sets (default: $FASTCLS_DATA, else ~/.cache/fastcls)")
    add("--out", metavar="DIR", help=out)
    add("--device", default="auto", help=DEVICES)
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")


def _train(options: argparse.Namespace) -> int:
    if options.resume and options.out is None:
        raise UserError("--resume needs --out DIR, the folder of the run to continue")
    set_threads(options.threads)
    out = options.out or f"runs/{options.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    finished = run(
        options.recipe,
        out,
        data=options.data,
        device=pick_device(options.device, _layers(options)),
        resume=options.resume,
        tensorboard=options.tensorboard,
        **settings(options),
    )
    if not finished and os.environ.get("RANK", "0") == "0":
        print(f"continue with: {shlex.join([*_program(), *_resume_arguments(options, out)])}")
    return 0 if finished else 130


def _program() -> list[str]:
    """How this program was called, without its arguments."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "fastcls"]
    script = sys.argv[0]
    if os.path.basename(script) == "__main__.py":
        return [sys.executable, "-m", "fastcls"]
    by_path = os.path.basename(script) == "fastcls" and script != shutil.which("fastcls")
    return [script if by_path else "fastcls"]


def _resume_arguments(options: argparse.Namespace, out: str) -> list[str]:
    """The settings are in the folder of the run; all other options are as they were given."""
    arguments = ["train", options.recipe, "--resume", "--out", out]
    for name, default in (("data", None), ("device", "auto"), ("threads", None)):
        if (value := getattr(options, name)) != default:
            arguments += [f"--{name}", str(value)]
    return arguments + ["--tensorboard"] * options.tensorboard


def _layers(options: argparse.Namespace) -> str:
    """Of the run: those asked for, else those that a resumed one had."""
    if options.resume and options.layers is None:
        return RunFolder(options.out).read_config().get("layers", "fused")
    return options.layers or "fused"


def settings(options: argparse.Namespace) -> dict:
    """The settings given on the command line.

    Raises:
        UserError: the recipe has no such setting.
    """
    given = {name: getattr(options, name, None) for name in SETTINGS}
    given = {name: value for name, value in given.items() if value is not None}
    known = {field.name for field in fields(recipes.get(options.recipe).Config)}
    if unknown := sorted(given.keys() - known):
        raise UserError(f"recipe {options.recipe} has no --{unknown[0].replace('_', '-')}")
    return given


MOST_THREADS = 1024  # some systems end a process that starts many more


def set_threads(count: int | None) -> None:
    if count is not None:
        if count < 1:
            raise UserError(f"--threads must be at least 1, got {count}")
        if count > MOST_THREADS:
            raise UserError(f"--threads must be at most {MOST_THREADS}, got {count}")
        torch.set_num_threads(count)


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
    return "cpu" if device.type == "cpu" else name  # an index of the CPU means nothing


def _compare(options: argparse.Namespace) -> int:
    from fastcls.compare import compare

    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    set_threads(options.threads)
    compare(
        options.recipe,
        options.out or f"runs/compare-{options.recipe}-{time.strftime('%Y%m%d-%H%M%S')}",
        seeds=options.seeds,
        data=options.data,
        device=pick_device(options.device, "fused"),
        **settings(options),
    )
    return 0


def _predict(options: argparse.Namespace) -> int:
    from fastcls.predict import predict

    predict(
        options.checkpoint,
        options.images,
        options.out,
        invert=options.invert,
        device=pick_device(options.device, "fused"),
    )
    return 0


def _filters(options: argparse.Namespace) -> int:
    from fastcls.filters import draw

    for file in draw(options.photo, options.out):
        print(file)
    return 0


def _info(options: argparse.Namespace) -> int:
    info = build_info()
    width = max(map(len, info))
    for name, value in info.items():
        text = (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
        print(f"{name:<{width}}  {text}")
    if options.kernels:
        for kernel, resources in kernel_resources().items():
            print(f"{kernel}\n    {resources}")
    return 0
