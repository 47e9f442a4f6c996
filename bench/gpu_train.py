"""Whole epochs on the GPU, and `mnist-speed`: `python bench/gpu_train.py --json auto`.

With tests/ on PYTHONPATH, as bench/gpu.sh has it.

Rows of op ``epoch`` have the seconds of one epoch in float16 autocast with a loss scale:

- ``loader-eager``: what tutorials do, a DataLoader over images and ToTensor, and an eager loop of
  native layers; a part of an epoch, reckoned up to a whole one
- ``eager-graph``, ``compile-graph``: native layers as fast as they go, the trainer with its batches
  from memory and each step a CUDA graph, and cuDNN choosing its kernels by trying them
- ``fused-graph``, ``fused-compile-graph``: the same trainer with fused layers, the others compiled
  or not; ``syncs``: how often a step waits for the GPU

Rows of op ``mnist-speed`` have the seconds of training of that recipe over many seeds, the capture
of the graph included, and the test accuracies, both sides by the trainer as it is.

Images are MNIST's where the folder has them, and random bytes else (field ``data``); CIFAR's are
always random bytes.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import mnist_speed
import report
import roofline
import torch
from PIL import Image
from recipe_helpers import write_mnist
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fastcls import recipes
from fastcls.compare import mean_and_spread
from fastcls.data import ImageSet, in_memory
from fastcls.datasets import data_root, torchvision_set
from fastcls.train import Trainer

BATCH = 512
SIDES = [
    *["fused-graph", "fused-graph-cl", "fused-compile-graph-cl"],
    *["eager-graph", "eager-graph-cl", "compile-graph-cl", "loader-eager"],
]
SPEED_SIDES = {"fused-graph-cl": "fused", "eager-graph-cl": "native"}
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


@dataclass
class Case:
    """A recipe and its training images."""

    recipe: str
    train: ImageSet
    data: str
    mean: list | None = None

    @property
    def normalisation(self):
        return {"mean": self.mean, "std": self.mean}


def cases(root: Path, data: str, images: int | None):
    mnist, *_ = torchvision_set("MNIST", root)
    cifar = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
    cifar = ImageSet(cifar, torch.randint(10, (50_000,)))
    yield Case("mnist-cnn", ImageSet(*(t[:images] for t in mnist)), data)
    yield Case("cifar-cnn", ImageSet(*(t[:images] for t in cifar)), "random", [0.5] * 3)


# ---------------------------------------------------------------------------------------- epochs


def make_trainer(case: Case, side: str, device: torch.device) -> Trainer:
    module = recipes.get(case.recipe)
    layers = "fused" if side.startswith("fused") else "native"
    config = module.Config(
        epochs=1000, batch_size=BATCH, layers=layers, amp=True, channels_last=side.endswith("-cl")
    )
    classes = [str(i) for i in range(10)]
    data = in_memory(case.train, case.train, classes, config, **case.normalisation)
    trainer = Trainer(module, config, data, device)
    # The trainer's choice is to be repeatable; native layers are to be fast.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    if "compile" in side:
        trainer.model.compile(dynamic=False)
    return trainer


def epoch_of(trainer: Trainer) -> float:
    """Seconds of a training epoch, without evaluation."""
    trainer.train_epoch()
    seconds = trainer.seconds
    trainer.epoch, trainer.step, trainer.seconds = trainer.epoch + 1, 0, 0.0
    return seconds


def syncs_per_step(trainer: Trainer) -> float | None:
    """How often a step waits: of 24 steps and of 4, so that beginning and end do not count.

    None where the profiler sees nothing of the GPU.
    """
    counts = []
    for steps in (4, 24):
        batches = trainer.data.train.epoch(trainer.epoch)
        with torch.profiler.profile() as profile:
            for images, labels in itertools.islice(batches, steps):
                trainer.train_step(images, labels)
        trainer.step = 0
        names = [event.name for event in profile.events()]
        if not any(name.startswith("cuda") for name in names):
            return None
        counts.append(sum(name.startswith(SYNCS) for name in names))
    return (counts[1] - counts[0]) / 20


class PilImages(Dataset):
    """Images as torchvision's data sets give them: through Pillow, then the transform."""

    def __init__(self, case: Case):
        steps = [transforms.ToTensor()]
        if case.mean:
            steps.append(transforms.Normalize(case.mean, case.mean))
        self.pixels = case.train.images.permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()
        self.labels, self.transform = case.train.labels, transforms.Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def loader_epoch(case: Case, device: torch.device, batches: int) -> float:
    """Seconds of an epoch by the tutorials' loop, from so many batches after the first."""
    module = recipes.get(case.recipe)
    config = module.Config(layers="native")
    model = module.build_model(config, 10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    loss_of = torch.nn.CrossEntropyLoss()
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    loader = DataLoader(PilImages(case), BATCH)
    for i, (images, labels) in enumerate(itertools.islice(loader, batches + 1)):
        if i == 1:
            wait(device)
            start = time.perf_counter()
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = loss_of(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    wait(device)
    return (time.perf_counter() - start) / i * len(loader)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def epoch_row(case: Case, device: torch.device, options) -> dict:
    seconds, row = {}, {"data": case.data}
    for side in options.sides or SIDES:
        if side == "loader-eager":
            seconds[side] = quartiles([loader_epoch(case, device, options.loader_batches)])
            continue
        trainer = make_trainer(case, side, device)
        epoch_of(trainer)  # compiles and captures
        seconds[side] = quartiles([epoch_of(trainer) for _ in range(options.epochs)])
        if side == "fused-graph-cl":
            row["syncs_per_step"] = syncs_per_step(trainer)
    torch._dynamo.reset()
    what = {"op": "epoch", "case": case.recipe, "mode": "train", "dtype": "float16"}
    return what | {"batch": BATCH, "own_batch": False, "seconds": seconds} | row


# ----------------------------------------------------------------------------------- mnist-speed


def speed_row(root: Path, data: str, device: torch.device, options) -> dict:
    seconds, accuracy, at_99, seeds = {}, {}, {}, options.seeds
    for side, layers in SPEED_SIDES.items():
        if options.sides and side not in options.sides:
            continue
        settings = {"layers": layers, "channels_last": True}
        mnist_speed.train(seeds, device.type, root, **settings)  # loads what libraries load
        runs = [mnist_speed.train(s, device.type, root, **settings) for s in range(seeds)]
        accuracies = [run["test_accuracy"] for run in runs]
        seconds[side] = quartiles([run["seconds"] for run in runs])
        accuracy[side] = list(mean_and_spread(accuracies))
        at_99[side] = sum(a >= 0.99 for a in accuracies)
    return {
        "op": "mnist-speed",
        "case": "mnist-speed",
        "mode": "train",
        "dtype": "tf32",
        "batch": 128,
        "own_batch": True,
        "seconds": seconds,
        "test_accuracy": accuracy,
        "seeds": seeds,
        "seeds_at_99": at_99,
        "data": data,
    }


def quartiles(values: list) -> list:
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3


# ----------------------------------------------------------------------------------------- main


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder that holds MNIST")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE", help="keep the rows; auto: in bench/results")
    parser.add_argument("--sides", type=lambda text: text.split(","), help=f"of {','.join(SIDES)}")
    parser.add_argument("--images", type=int, help="so many training images only")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--loader-batches", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=30, help="of mnist-speed; 0: without it")
    return parser.parse_args()


def main():
    options = arguments()
    device, root, data = torch.device(options.device), data_root(options.data), "MNIST"
    rows = []

    def keep(row):
        with device:  # the machine's figures are of the default device
            row |= roofline.circumstances(row["dtype"], 1)
            if options.json:
                path = report.machine_file() if options.json == "auto" else options.json
                report.keep(row, path)
        rows.append(row)
        print({name: row[name] for name in ("op", "case", "seconds")}, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").exists():
            root, data = Path(folder), "random"
            write_mnist(root, options.images or 60_000)
        for case in cases(root, data, options.images):
            keep(epoch_row(case, device, options))
        if options.seeds:
            keep(speed_row(root, data, device, options))
    print(report.text(rows))


if __name__ == "__main__":
    main()
