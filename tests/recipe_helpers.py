"""Small data sets and runs that the tests of training share."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import torch

from fastcls.files import read_records
from fastcls.runs import RunFolder

SPEEDS = ["seconds", "images_per_second"]


def write_mnist(root, n=6):
    """A data set in MNIST's format; returns its pixels and labels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8)
    labels = (torch.arange(n) % 10).to(torch.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        header = struct.pack(">2i", 0x801, n)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return pixels, labels


class SmallVgg(torch.nn.Module):
    """The parts of torchvision's VGG-16, with few channels."""

    def __init__(self, weights=None, init_weights=True):
        super().__init__()
        nn = torch.nn
        chain = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(True), nn.Conv2d(4, 4, 3, padding=1)]
        self.features = nn.Sequential(*chain, nn.ReLU(True), nn.MaxPool2d(2, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        hidden = [nn.Linear(16, 4096), nn.ReLU(True), nn.Dropout(0.5)]
        self.classifier = nn.Sequential(*hidden, nn.Linear(4096, 1000))


def run_child(*arguments, **environment):
    """Python with these arguments in a process of its own, and the package that is tested here."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent,
        env=variables,
        capture_output=True,
        text=True,
    )


def numbers(folder):
    """Everything a run computed, without the clock's figures."""
    folder = RunFolder(folder)
    metrics = [
        {k: v for k, v in record.items() if k not in SPEEDS}
        for record in read_records(folder.metrics)
    ]
    states = [torch.load(file, weights_only=True)["model"] for file in (folder.last, folder.best)]
    weights = [tensor for state in states for tensor in state.values()]
    return metrics, read_records(folder.steps), weights


def assert_same_numbers(folder, other):
    (metrics, steps, weights), (metrics2, steps2, weights2) = numbers(folder), numbers(other)
    assert metrics == metrics2
    assert steps == steps2
    assert all(torch.equal(a, b) for a, b in zip(weights, weights2, strict=True))
