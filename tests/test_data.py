"""Batches from memory: values, order, splits, and what a user is told about missing data."""

import struct

import pytest
import torch

from fastcls.data import Batches, ImageSet, data_root, digits, split, torchvision_set
from fastcls.errors import UserError


def image_set(n, channels=1, size=4):
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
    return images, torch.arange(n)


def labels_of(batches, *epoch):
    return torch.cat([labels for _, labels in batches.epoch(*epoch)])


def write_mnist(root, n=6):
    """A data set in MNIST's format; returns its pixels and labels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8)
    labels = torch.arange(n, dtype=torch.uint8)
    for part in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, n, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.numpy().tobytes())
        header = struct.pack(">2i", 0x801, n)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())
    return pixels, labels


@pytest.mark.parametrize("mean, std", [(None, None), ([0.5], [0.5]), ([0.1, 0.2, 0.3], [0.3] * 3)])
def test_equals_to_tensor_and_normalize(mean, std):
    transforms = pytest.importorskip("torchvision.transforms")
    images, labels = image_set(7, channels=3)
    expected = [transforms.ToTensor()(image.permute(1, 2, 0).numpy()) for image in images]
    if mean is not None:
        expected = [transforms.Normalize(mean, std)(image) for image in expected]
    batches = Batches(images, labels, 3, mean=mean, std=std)
    got = torch.cat([batch for batch, _ in batches.epoch()])
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.stack(expected))


def test_reading_leaves_the_images_alone():
    images, labels = image_set(5)
    before = images.clone()
    for batch, _ in Batches(images, labels, 2, mean=[0.5], std=[0.5]).epoch():
        batch.zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_once_with_its_label(shuffle):
    images = torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1)
    batches = Batches(images, torch.arange(11), 4, shuffle=shuffle)
    parts = list(batches.epoch())
    assert [len(labels) for _, labels in parts] == [4, 4, 3]
    assert len(batches) == 3
    for batch, labels in parts:
        assert torch.equal((batch.flatten() * 255).round().long(), labels)
    assert labels_of(batches).sort().values.tolist() == list(range(11))


def test_order_is_a_function_of_seed_and_epoch():
    images = image_set(50)
    first, again, other = (Batches(*images, 8, shuffle=True, seed=s) for s in (1, 1, 2))
    assert torch.equal(labels_of(first, 3), labels_of(again, 3))
    assert not torch.equal(labels_of(first, 3), labels_of(first, 4))
    assert not torch.equal(labels_of(first, 3), labels_of(other, 3))
    assert torch.equal(labels_of(Batches(*images, 8), 3), torch.arange(50))


def test_shuffling_leaves_the_global_generator_alone():
    batches = Batches(*image_set(9), 2, shuffle=True)
    state = torch.get_rng_state()
    list(batches.epoch(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_start_continues_an_epoch():
    batches = Batches(*image_set(20), 3, shuffle=True)
    assert torch.equal(labels_of(batches, 2, 4), labels_of(batches, 2)[12:])


def test_split_is_seeded_and_loses_nothing():
    images = ImageSet(*image_set(100))
    rest, held_out = split(images, 0.2, seed=1)
    assert (len(rest.labels), len(held_out.labels)) == (80, 20)
    assert sorted(torch.cat([rest.labels, held_out.labels]).tolist()) == list(range(100))
    assert torch.equal(rest.images, images.images[rest.labels])
    assert torch.equal(split(images, 0.2, seed=1)[1].labels, held_out.labels)
    assert not torch.equal(split(images, 0.2, seed=2)[1].labels, held_out.labels)


def test_digits_are_split_by_class():
    train, test, classes = digits()
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert classes == list("0123456789")
    counts = test.labels.bincount()
    assert counts.min() >= 35 and counts.max() <= 37


def test_data_root(monkeypatch):
    monkeypatch.delenv("FASTCLS_DATA", raising=False)
    assert data_root().parts[-2:] == (".cache", "fastcls")
    monkeypatch.setenv("FASTCLS_DATA", "/by/variable")
    assert str(data_root()) == "/by/variable"
    assert str(data_root("/by/option")) == "/by/option"


def test_reads_torchvision_layout(tmp_path):
    pytest.importorskip("torchvision")
    pixels, labels = write_mnist(tmp_path)
    train, test, classes = torchvision_set("MNIST", tmp_path)
    for part in (train, test):
        assert torch.equal(part.images, pixels.unsqueeze(1))
        assert torch.equal(part.labels, labels.long())
    assert classes == list("0123456789")


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10"])
def test_missing_data_names_two_ways(name, tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def no_network(self):
        (tmp_path / "new" / name).mkdir(parents=True)
        raise OSError("no route\nto host")

    monkeypatch.setattr(getattr(datasets, name), "download", no_network)
    with pytest.raises(UserError) as error:
        torchvision_set(name, tmp_path / "new")
    message = str(error.value)
    for part in (name, str(tmp_path / "new"), "no route to host", "--data", "FASTCLS_DATA"):
        assert part in message
    assert "with a network" in message
    assert "\n" not in message


def test_failed_download_leaves_nothing(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def no_network(self):
        (tmp_path / "new" / "MNIST" / "raw").mkdir(parents=True)
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    with pytest.raises(UserError):
        torchvision_set("MNIST", tmp_path / "new")
    assert tmp_path.exists() and not any(tmp_path.iterdir())


def test_absent_data_is_downloaded(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: write_mnist(tmp_path))
    train, _, _ = torchvision_set("MNIST", tmp_path)
    assert len(train.labels) == 6


def test_damaged_data_is_named(tmp_path):
    pytest.importorskip("torchvision")
    write_mnist(tmp_path)
    images = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"MNIST in .* is damaged"):
        torchvision_set("MNIST", tmp_path)
