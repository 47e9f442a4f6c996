"""One whole training step of the reference nets: zero_grad, forward, loss, backward, SGD.

Memory is measured in a process of its own, `python bench/bench_train.py NET SIDE BATCH DTYPE`,
which prints what one step takes at its peak beyond the net, its optimiser and the batch.
"""

import ctypes
import functools
import gc
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import Replay, autocast, on_cuda, rotate, torch_dtype

from fastcls import models


@dataclass(frozen=True)
class Case:
    """A net and the shape of its images."""

    name: str
    net: type
    image: tuple
    batch: int = 3


CASES = [
    Case("mnist-cnn", models.MnistCnn, (1, 28, 28)),
    Case("cifar-cnn", models.CifarCnn, (3, 32, 32)),
]
BATCHES_IN_MEMORY = 8
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16", "tf32", "float32"]}


def make_step(case, side, dtype):
    """A function of (images, labels) that trains a new net one step; returns the loss.

    ``side``: "fused", "eager" or "compile", with -cl for channels-last.
    """
    torch.manual_seed(0)
    layers = "fused" if side.startswith("fused") else "native"
    net = case.net(layers)
    if side.endswith("-cl"):
        net = net.to(memory_format=torch.channels_last)
    loss_of = models.LAYERS[layers].cross_entropy()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9, fused=True)

    def forward(images, labels):
        with autocast(dtype):
            return loss_of(net(images), labels)

    if side.startswith("compile"):
        forward = torch.compile(forward, dynamic=False)

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        loss = forward(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def make_data(case, side, batch):
    images = torch.rand(batch, *case.image)
    if side.endswith("-cl"):
        images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, (batch,))


def make_sides(case, dtype, batch, peers):
    """{name: function that runs one step}; -graph: a CUDA graph with one step for each batch."""
    names = ["fused-cl", "fused-graph-cl"] if on_cuda() else ["fused", "fused-cl"]
    names += [name for name in peers if name.split("-")[0] in ("eager", "compile")]
    step_of = functools.cache(functools.partial(make_step, case, dtype=dtype))

    def side(name):
        step = step_of(name.replace("-graph", "").replace("-max", ""))
        data = [make_data(case, name, batch) for _ in range(BATCHES_IN_MEMORY)]
        if "-graph" in name:
            return Replay([functools.partial(step, *pair) for pair in data])
        turns = rotate(data)
        return lambda: step(*next(turns))

    return {name: side(name) for name in names if "-max" not in name}


# -------------------------------------------------------------------------------------- memory


def peak_memory(case, side, batch, dtype):
    """Bytes at the peak of one step, measured in a new process."""
    # With a fixed threshold every large tensor is given back to the system when it is freed, so
    # that the resident memory follows what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, case.name, side, str(batch), dtype]
    command.append(str(torch.get_num_threads()))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        command,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return int(done.stdout)


def _resident(field):
    """VmRSS (now) or VmHWM (peak since the last reset) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def print_peak_memory(name, side, batch, dtype, threads):
    torch.set_num_threads(int(threads))
    case = next(c for c in CASES if c.name == name)
    step = make_step(case, side, torch_dtype(dtype))
    data = make_data(case, side, int(batch))
    for _ in range(3):  # compiles, and makes libraries keep what they keep
        step(*data)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # or freed memory kept by malloc would hide what the step takes
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    step(*data)
    print(_resident("VmHWM") - before)


# --------------------------------------------------------------------------------------- tests


def check(case, name, batch):
    """Two steps fused and native, dropout included, from the same seed: the same losses."""
    data = make_data(case, "fused", batch)
    losses = []
    for side in ("fused", "eager"):
        step = make_step(case, side, torch_dtype(name))
        torch.manual_seed(1)  # of the dropouts
        losses.append(torch.stack([step(*data) for _ in range(2)]))
    rtol = 1e-4 if name == "float32" else 2e-2
    torch.testing.assert_close(*losses, rtol=rtol, atol=0)


def test_train_step(case, batch, dtype, threads, peers, measure):
    if measure:
        row = {
            "op": "train_step",
            "case": case.name,
            "mode": "train",
            "dtype": dtype,
            "batch": batch,
            "own_batch": False,
        }

        def sides():
            made = make_sides(case, torch_dtype(dtype), batch, peers)
            if not on_cuda() and Path("/proc/self/clear_refs").exists():
                row["peak_memory"] = {s: peak_memory(case, s, batch, dtype) for s in made}
            return made

        measure(row, sides)
    check(case, dtype, batch)


if __name__ == "__main__":
    print_peak_memory(*sys.argv[1:])
