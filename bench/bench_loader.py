"""Batches from memory against what the tutorials do: a DataLoader over images and ToTensor."""

import pytest
import torch
from measure import alternate, on_cuda
from recipe_helpers import write_mnist
from torch.utils.data import DataLoader

from fastcls.data import Input, MemoryBatches
from fastcls.datasets import torchvision_set

datasets = pytest.importorskip("torchvision.datasets")
transforms = pytest.importorskip("torchvision.transforms")

IMAGES, BATCH = 6_000, 512
SECONDS = 20
# What the memory must be worth, in images per second.
AT_LEAST = 20


@pytest.fixture
def mnist(tmp_path, request):
    """A data set of MNIST's format."""
    images = IMAGES if request.config.getoption("benchmark") else 700
    write_mnist(tmp_path, images)
    return tmp_path


def make_loaders(root):
    """{name: iterable of batches}, all in the order of the files."""
    train, _, _ = torchvision_set("MNIST", root)
    memory = MemoryBatches(*train, BATCH, Input(1, 28))
    images = datasets.MNIST(root, transform=transforms.ToTensor())
    return {"memory": memory, "loader": DataLoader(images, BATCH)}


def batches(loader):
    return loader.epoch() if isinstance(loader, MemoryBatches) else loader


def test_loader(mnist, request, threads):
    if on_cuda():
        pytest.skip("of the CPU")
    loaders = make_loaders(mnist)
    ours, theirs = (batches(loader) for loader in loaders.values())
    for (images, labels), (images2, labels2) in zip(ours, theirs, strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)
    if not request.config.getoption("benchmark"):
        return
    sides = {
        name: lambda loader=loader: sum(len(labels) for _, labels in batches(loader))
        for name, loader in loaders.items()
    }
    times = alternate(lambda: request.getfixturevalue("benchmark"), sides, SECONDS, threads)
    rates = {name: IMAGES / median for name, (_, median, _) in times.items()}
    ratio = rates["memory"] / rates["loader"]
    print(
        f"\nimages/s from memory {rates['memory']:.0f}, by DataLoader and ToTensor "
        f"{rates['loader']:.0f}: {ratio:.0f} times as many, {threads} threads"
    )
    assert ratio >= AT_LEAST
