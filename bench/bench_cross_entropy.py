"""cross_entropy against PyTorch: the loss and the gradient of the logits, few classes and many.

Modes: "train", one forward and backward pass; "graph", as much for sixteen losses of one graph, so
that starting the backward pass counts once for sixteen; "infer", the loss alone. On CUDA without
"graph", and without autocast, which would have PyTorch cast half-precision logits first.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import math
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_error_within_twice_native
from measure import Replay, autocast, on_cuda, rotate, torch_dtype

from fastcls import functional


@dataclass(frozen=True)
class Case:
    """Logits (batch, classes, *places) and class-index targets."""

    name: str
    why: str
    classes: int
    label_smoothing: float = 0.0
    batch: int = 3
    places: tuple[int, ...] = ()
    ignored: float = 0.0  # part of the targets

    def shape(self, batch):
        return batch, self.classes, *self.places


CASES = [
    Case("digits10", "the small data sets at the common batch sizes", 10),
    Case("digits10-smooth", "label smoothing reads every logit twice in PyTorch", 10, 0.1),
    Case("rows20", "20 rows: nothing but the overhead of the calls", 10, batch=20),
    Case("rows128", "128 rows: overhead and arithmetic", 10, batch=128),
    Case("many-rows", "few classes, many rows: one row is shorter than a vector", 10, batch=16384),
    Case("binary", "the fewest classes", 2, batch=16384),
    Case(
        "segmentation",
        "every pixel a row, strided classes, borders that do not count",
        classes=21,
        batch=4,
        places=(128, 128),
        ignored=0.1,
    ),
    Case("classes100", "CIFAR-100", 100, batch=4096),
    Case("imagenet1000", "ImageNet", 1000, batch=512),
    Case("wide32k", "a row of 128 KB", 32000, batch=256),
    Case("wide128k", "a row of 512 KB, as much as a second-level cache", 128000, batch=64),
]
CUDA_CASES = [
    Case("rows128", "128 rows: nothing but the launches", 10, batch=128),
    Case("many-rows", "few classes, many rows", 10, batch=16384),
    Case("classes100", "CIFAR-100", 100, batch=4096),
    Case("imagenet1000", "ImageNet", 1000, batch=8192),
    Case("imagenet1000-more", "ImageNet, more rows", 1000, batch=32768),
    Case("wide4k", "a row of 16 KB", 4096, batch=8192),
    Case("wide16k", "a row of 64 KB", 16384, batch=8192),
    Case("wide32k", "a row of 128 KB", 32000, batch=4096),
    Case("wide128k", "a row of 512 KB: more than shared memory holds", 128000, batch=2048),
    Case("wide256k", "a row of 1 MB", 262144, batch=1024),
]
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16", "float16", "float32"]}
IGNORED = -100  # the losses' default
IN_GRAPH, MOST_IN_GRAPH = 16, 1 << 14  # losses of a graph; logits of each
BUFFER_BYTES, MAX_BUFFERS = 256 << 20, 16
MOST_CHECKED = 1 << 26  # logits


def make_data(case, dtype, batch):
    """(logits [N, C, ...], targets [N, ...])"""
    logits = (3 * torch.randn(case.shape(batch))).to(dtype)
    target = torch.randint(case.classes, (batch, *case.places))
    if case.ignored:
        target[torch.rand(target.shape) < case.ignored] = IGNORED
    return logits.requires_grad_(), target


def work(case, mode, dtype, batch):
    """Bytes that must move at least: the logits once, the gradient once, the targets."""
    logits = math.prod(case.shape(batch))
    targets = logits // case.classes
    once = logits * dtype.itemsize * (1 if mode == "infer" else 2) + 8 * targets
    return {"bytes": once * (IN_GRAPH if mode == "graph" else 1)}


def as_in_training(dtype):
    """To be entered in every step; made once, which takes longer than entering it."""
    return contextlib.nullcontext() if on_cuda() else autocast(dtype)


def train_step(loss, case, context, logits, target):
    with context:
        value = loss(logits, target, label_smoothing=case.label_smoothing)
    return value, *torch.autograd.grad(value, logits)


def graph_step(loss, case, context, logits, target):
    with context:
        values = [
            loss(logits, target, label_smoothing=case.label_smoothing) for _ in range(IN_GRAPH)
        ]
    return *values, *torch.autograd.grad(values, logits)


def infer_step(loss, case, context, logits, target):
    with torch.no_grad(), context:
        return (loss(logits, target, label_smoothing=case.label_smoothing),)


STEPS = {"train": train_step, "graph": graph_step, "infer": infer_step}


# Losses of other libraries, for CUDA: (package, module, function). Liger's writes the gradient over
# the logits and waits for the GPU, which keeps it out of CUDA graphs.
LIBRARIES = {
    "liger": ("liger-kernel", "liger_kernel.transformers.functional", "liger_cross_entropy"),
    "quack": ("quack-kernels", "quack.cross_entropy", "cross_entropy"),
}


@functools.cache
def library(name):
    """The library's loss, or None where it is not installed."""
    _, module, function = LIBRARIES[name]
    try:
        loss = getattr(importlib.import_module(module), function)
    except ImportError:
        return None
    # QuACK's takes no label_smoothing, and asks for mean by name in some versions.
    return loss if name == "liger" else lambda x, target, label_smoothing: loss(x, target)


def versions():
    """Of the libraries that are installed."""
    return {
        package: importlib.metadata.version(package)
        for name, (package, _, _) in LIBRARIES.items()
        if library(name)
    }


def make_sides(case, mode, dtype, batch, peers):
    """{name: function that runs one step}; memory formats do not apply to logits.

    "-graph": a CUDA graph with one step for each of the buffers.
    """
    first = make_data(case, dtype, batch)
    # Logits as large as all buffers push themselves out of the caches.
    count = min(max(BUFFER_BYTES // first[0].nbytes, 1), MAX_BUFFERS)
    data = [first] + [make_data(case, dtype, batch) for _ in range(count - 1)]
    losses = {
        "fused": functional.cross_entropy,
        "eager": F.cross_entropy,
        "compile": torch.compile(F.cross_entropy, dynamic=False),
    }
    if on_cuda():
        losses |= {name: library(name) for name in LIBRARIES}

    def side(name):
        loss = losses[name.removesuffix("-graph")]
        step = functools.partial(STEPS[mode], loss, case, as_in_training(dtype))
        tensors = data
        if name == "liger":
            tensors = [(x.detach().clone().requires_grad_(mode != "infer"), t) for x, t in data]
        if name.endswith("-graph"):
            return Replay([functools.partial(step, *pair) for pair in tensors])
        turns = rotate(tensors)
        return lambda: step(*next(turns))

    ours = ["fused", "fused-graph"] if on_cuda() else ["fused"]
    names = dict.fromkeys([*ours, *(peer.removesuffix("-cl") for peer in peers)])
    names = [n for n in names if losses.get(n.removesuffix("-graph"))]
    made = {name: tried(side, name) for name in names}
    return {name: call for name, call in made.items() if call}


def tried(side, name):
    """A library's side is left out, with a warning, where the library fails on the case."""
    if name.split("-")[0] not in LIBRARIES:
        return side(name)
    try:
        call = side(name)
        call()
    except Exception as error:
        warnings.warn(f"{name}: {type(error).__name__}: {error}", stacklevel=1)
        return None
    return call


def check(case, mode, dtype, batch):
    """Fused against native on the same logits: at most twice the error, against float64."""
    torch.manual_seed(0)
    # As many rows as processes that share a GPU have room for in float64.
    logits, target = make_data(case, dtype, min(batch, MOST_CHECKED // math.prod(case.shape(1))))
    exact = logits.detach().double().requires_grad_()
    results = (
        STEPS[mode](functional.cross_entropy, case, as_in_training(dtype), logits, target),
        STEPS[mode](F.cross_entropy, case, as_in_training(dtype), logits, target),
        STEPS[mode](F.cross_entropy, case, contextlib.nullcontext(), exact, target),
    )
    for ours, native, reference in zip(*results, strict=True):
        assert_error_within_twice_native(ours, [native], reference, f"{case.name} {mode}")


@pytest.mark.parametrize("mode", STEPS)
def test_cross_entropy(case, batch, mode, dtype, threads, peers, measure):
    kind = torch_dtype(dtype)
    if mode == "graph" and (on_cuda() or math.prod(case.shape(batch)) > MOST_IN_GRAPH):
        pytest.skip("only for logits so few that starting the backward pass matters")
    if measure:
        row = {
            "op": "cross_entropy",
            "case": case.name,
            "mode": mode,
            "dtype": dtype,
            "batch": batch,
            "own_batch": case.batch != Case.batch,
            **work(case, mode, kind, batch),
        }
        if on_cuda():
            row["peers"] = versions()
        measure(row, functools.partial(make_sides, case, mode, kind, batch, peers))
    check(case, mode, kind, batch)
