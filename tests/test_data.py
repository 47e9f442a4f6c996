"""Batches from memory: values, order, splits, and what a user is told about missing data."""

import pytest
import torch
from recipe_helpers import write_mnist

from fastcls.augment import RandomAffine
from fastcls.data import ImageSet, Input, MemoryBatches, digits, split
from fastcls.datasets import data_root, torchvision_set
from fastcls.distributed import Share
from fastcls.errors import UserError


def image_set(n, channels=1, size=4):
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)
    return images, torch.arange(n)


def batches_of(images, labels, batch_size, mean=None, std=None, **options):
    _, channels, size, _ = images.shape
    return MemoryBatches(images, labels, batch_size, Input(channels, size, mean, std), **options)


def labels_of(batches, *epoch):
    return torch.cat([labels for _, labels in batches.epoch(*epoch)])


@pytest.mark.parametrize("mean, std", [(None, None), ([0.5], [0.5]), ([0.1, 0.2, 0.3], [0.3] * 3)])
def test_equals_to_tensor_and_normalize(mean, std):
    transforms = pytest.importorskip("torchvision.transforms")
    images, labels = image_set(7, channels=3)
    expected = [transforms.ToTensor()(image.permute(1, 2, 0).numpy()) for image in images]
    if mean is not None:
        expected = [transforms.Normalize(mean, std)(image) for image in expected]
    batches = batches_of(images, labels, 3, mean=mean, std=std)
    got = torch.cat([batch for batch, _ in batches.epoch()])
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.stack(expected))


def test_reading_leaves_the_images_alone():
    images, labels = image_set(5)
    before = images.clone()
    for batch, _ in batches_of(images, labels, 2, mean=[0.5], std=[0.5]).epoch():
        batch.zero_()
    assert torch.equal(images, before)


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_image_once_with_its_label(shuffle):
    images = torch.arange(11, dtype=torch.uint8).view(11, 1, 1, 1)
    batches = batches_of(images, torch.arange(11), 4, shuffle=shuffle)
    parts = list(batches.epoch())
    assert [len(labels) for _, labels in parts] == [4, 4, 3]
    assert len(batches) == 3
    for batch, labels in parts:
        assert torch.equal((batch.flatten() * 255).round().long(), labels)
    assert labels_of(batches).sort().values.tolist() == list(range(11))


def test_order_is_a_function_of_seed_and_epoch():
    images = image_set(50)
    first, again, other = (batches_of(*images, 8, shuffle=True, seed=s) for s in (1, 1, 2))
    assert torch.equal(labels_of(first, 3), labels_of(again, 3))
    assert not torch.equal(labels_of(first, 3), labels_of(first, 4))
    assert not torch.equal(labels_of(first, 3), labels_of(other, 3))
    assert torch.equal(labels_of(batches_of(*images, 8), 3), torch.arange(50))


def test_shuffling_leaves_the_global_generator_alone():
    batches = batches_of(*image_set(9), 2, shuffle=True)
    state = torch.get_rng_state()
    list(batches.epoch(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_start_continues_an_epoch():
    batches = batches_of(*image_set(20), 3, shuffle=True)
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
    with pytest.raises(
        UserError, match=r"MNIST in .* is damaged: train-images-idx3-ubyte \(\d+ bytes, expected"
    ):
        torchvision_set("MNIST", tmp_path)


def test_shares_of_a_batch_make_the_batch():
    images = image_set(23)
    whole = batches_of(*images, 5, shuffle=True, augment=RandomAffine(10, 0.1))
    parts = [batches_of(*images, 5, shuffle=True, augment=RandomAffine(10, 0.1)) for _ in range(3)]
    for rank, part in enumerate(parts):
        part.to(torch.device("cpu"), Share(rank, 3))
    for (x, labels), *shares in zip(whole.epoch(2), *(p.epoch(2) for p in parts), strict=True):
        for rank, (share, share_labels) in enumerate(shares):
            assert torch.equal(share, x[rank::3])
            assert torch.equal(share_labels, labels[rank::3])


def test_augmentation_turns_and_shifts():
    x = torch.rand(1, 2, 6, 6)
    nothing = RandomAffine(30, 0.5)(x, torch.zeros(1, 3))
    torch.testing.assert_close(nothing, x)
    quarter = RandomAffine(degrees=90)(x, torch.tensor([[1.0, 0, 0]]))
    torch.testing.assert_close(quarter, x.rot90(dims=(2, 3)), atol=1e-5, rtol=0)
    shifted = RandomAffine(shift=0.5)(x, torch.tensor([[0.0, 1, 0]]))  # by half of the width
    expected = torch.cat([x[..., 3:], torch.zeros(1, 2, 6, 3)], 3)
    torch.testing.assert_close(shifted, expected, atol=1e-5, rtol=0)


def test_augmentation_turns_in_pixels_where_images_are_not_square():
    x = torch.zeros(1, 1, 5, 9)
    x[..., 2, :] = 1  # a row through the centre becomes a column of the image's height
    turned = RandomAffine(degrees=90)(x, torch.tensor([[1.0, 0, 0]]))
    expected = torch.zeros(1, 1, 5, 9)
    expected[..., :, 4] = 1
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=0)


def test_augmentation_is_each_images_own_and_each_epochs():
    images = torch.randint(0, 256, (1, 1, 9, 9), dtype=torch.uint8).expand(8, 1, 9, 9)
    batches = batches_of(images, torch.arange(8), 3, augment=RandomAffine(20, 0.2))
    first, again, next_epoch = (torch.cat([x for x, _ in batches.epoch(n)]) for n in (0, 0, 1))
    assert torch.equal(first, again)
    assert len({tuple(x.flatten().tolist()) for x in torch.cat([first, next_epoch])}) == 16
    assert torch.equal(next(batches.epoch(0, start=2))[0], first[6:])


def test_prepare_makes_what_the_model_takes():
    image = pytest.importorskip("PIL.Image").new("RGB", (80, 40), "white")
    for channels in (1, 3):
        x = Input(channels, 28).prepare(image)
        assert x.shape == (channels, 28, 28) and x.dtype == torch.uint8 and x.min() == 255
