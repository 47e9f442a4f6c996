"""Whole nets of native layers, swapped by one call: ``fuse`` and the compile backend.

Rows of op ``fuse`` have ``fastcls.fuse(net)`` as ``fused``; rows of op ``compile`` have
``torch.compile(net, backend="fastcls")``. The peers of both are the net as it is and compiled by
Inductor. A training step is zero_grad, forward, loss, backward and a fused SGD step.
"""

import functools
from dataclasses import dataclass

import pytest
import torch
import torchvision
from measure import rotate

from fastcls import fuse, models
from fastcls.fusing import dynamo

BATCHES_IN_MEMORY = 2
FORMATS = {"": torch.contiguous_format, "-cl": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A net of native layers, and the shape of its images and labels."""

    name: str
    net: object
    image: tuple
    classes: int
    batch: int = 3


def native(kind):
    return lambda: kind("native")


LARGE = [
    Case("alexnet", torchvision.models.alexnet, (3, 224, 224), 1000, batch=16),
    Case("vgg16", torchvision.models.vgg16, (3, 224, 224), 1000, batch=4),
]
SMALL = [
    Case("mnist-cnn", native(models.MnistCnn), (1, 28, 28), 10),
    Case("cifar-cnn", native(models.CifarCnn), (3, 32, 32), 10),
]
CASES = LARGE + SMALL


def make_call(op, side, net, optimizer, mode):
    """A function of (images, labels): a training step that returns its loss, or one inference."""
    loss_of = torch.nn.CrossEntropyLoss()
    swapped = side.startswith("fused")
    if op == "fuse" and swapped:
        net, loss_of = fuse(net), fuse(loss_of)

    def forward(images, labels):
        return loss_of(net(images), labels) if mode == "train" else net(images)

    if side.startswith("compile"):
        forward = torch.compile(forward, dynamic=False)
    if op == "compile" and swapped:  # its name is known only where the package is installed
        forward = torch.compile(forward, backend=dynamo.fastcls, dynamic=False)
    if mode == "infer":
        return torch.no_grad()(forward)

    def step(images, labels):
        optimizer.zero_grad(set_to_none=True)
        loss = forward(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def make_sides(op, case, mode, batch, peers):
    """{name: function that runs one step}; the sides of one memory format share net and data."""
    shared = {}
    for end, memory_format in FORMATS.items():
        torch.manual_seed(0)
        net = case.net().to(memory_format=memory_format).train(mode == "train")
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, fused=True)
        data = [make_data(case, batch, memory_format) for _ in range(BATCHES_IN_MEMORY)]
        shared[end] = net, optimizer, data

    def side(name):
        net, optimizer, data = shared["-cl" if name.endswith("-cl") else ""]
        call, turns = make_call(op, name, net, optimizer, mode), rotate(data)
        return lambda: call(*next(turns))

    peers = [p for p in peers if p.startswith(("eager", "compile")) and "-graph" not in p]
    return {name: side(name) for name in ["fused", "fused-cl", *peers]}


def make_data(case, batch, memory_format):
    images = torch.randn(batch, *case.image).contiguous(memory_format=memory_format)
    return images, torch.randint(case.classes, (batch,))


# Without this setting Inductor's dropout draws other numbers than PyTorch's.
@torch._inductor.config.patch(fallback_random=True)
def check(op, case, mode, batch):
    """Native and fused from one seed: the same losses of two steps, or the same outputs."""
    torch._dynamo.reset()  # or code that was compiled without the setting serves again
    data = make_data(case, batch, torch.contiguous_format)
    results = []
    for side in ("fused", "eager"):
        torch.manual_seed(0)
        net = case.net().train(mode == "train")
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)
        call = make_call(op, side, net, optimizer, mode)
        torch.manual_seed(1)  # of the dropouts
        results.append(torch.stack([call(*data) for _ in range(2)]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def run(op, case, mode, batch, peers, measure):
    if measure:
        row = {"op": op, "case": case.name, "mode": mode, "dtype": "float32", "batch": batch}
        row["own_batch"] = case.batch != Case.batch
        measure(row, functools.partial(make_sides, op, case, mode, batch, peers))
    check(op, case, mode, batch)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_fuse(case, batch, mode, threads, peers, measure):
    run("fuse", case, mode, batch, peers, measure)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_compile_backend(case, batch, mode, threads, peers, measure):
    if case in LARGE:
        pytest.skip("the reference nets only: compiling the large ones takes minutes a side")
    run("compile", case, mode, batch, peers, measure)


def test_compiled_rows_are_checked(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a broken backend")

    monkeypatch.setattr(dynamo, "fastcls", broken)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a broken backend"):
        check("compile", SMALL[0], "infer", 2)


@pytest.mark.parametrize("op", ["fuse", "compile"])
def test_rows_have_all_peers(op):
    peers = ["eager", "eager-cl", "compile", "compile-cl"]
    sides = make_sides(op, SMALL[0], "infer", 2, peers)
    assert list(sides) == ["fused", "fused-cl", *peers]
