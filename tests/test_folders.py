"""Class folders: the same batches whoever reads them, splits, and damaged files named."""

import multiprocessing
import os

import pytest
import torch

from fastcls import recipes
from fastcls.data import Input
from fastcls.distributed import Share
from fastcls.errors import UserError
from fastcls.folders import FolderBatches, check_images, class_folders, open_image
from fastcls.recipes.caltech_transfer import augmentation, load_data
from fastcls.signals import STOPS

Image = pytest.importorskip("PIL.Image")
np = pytest.importorskip("numpy")
v2 = pytest.importorskip("torchvision.transforms.v2")

INPUT = Input(3, 16, mean=[0.5] * 3, std=[0.5] * 3, resize=20)
CLASSES = ("ant", "bee", "cat")
MODES = ("RGB", "L", "RGBA")  # class folders hold grey and transparent pictures too


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, mode in zip(CLASSES, MODES, strict=True):
        (tmp_path / name).mkdir()
        for i in range(8):
            pixels = torch.randint(0, 256, (30 + i, 24, 3), generator=generator).byte()
            image = Image.fromarray(pixels.numpy()).convert(mode)
            image.save(tmp_path / name / f"{i}.{'png' if mode == 'RGBA' else 'jpg'}")
    return tmp_path


def random_crop():
    return v2.Compose([v2.PILToTensor(), v2.RandomCrop(16), v2.ColorJitter(0.5)])


def load(folder, **changes):
    settings = recipes.get("caltech-transfer").Config(batch_size=5, **changes)
    options = {"fractions": (0.5, 0.25), "transform": random_crop(), "workers": settings.workers}
    return class_folders(folder, settings, INPUT, **options)


def test_split(folder):
    data = load(folder, workers=0)
    assert data.classes == list(CLASSES)
    parts = (data.train, data.val, data.test)
    assert [len(part.labels) for part in parts] == [12, 6, 6]
    files = [file for part in parts for file in part.files.files]
    assert len(set(files)) == 24
    for part in parts:
        names = [CLASSES[label] for label in part.labels]
        assert all(f"/{n}/" in f for n, f in zip(names, part.files.files, strict=True))
    assert load(folder, workers=0).test.files.files == data.test.files.files
    assert load(folder, workers=0, seed=1).test.files.files != data.test.files.files


def test_workers_change_nothing(folder):
    alone, helped = (load(folder, workers=n).train for n in (0, 2))
    for (images, labels), (images2, labels2) in zip(alone.epoch(1), helped.epoch(1), strict=True):
        assert torch.equal(images, images2)
        assert torch.equal(labels, labels2)


def test_signals_to_all_processes_are_the_training_s_alone_to_heed(folder):
    """Schedulers of batch jobs send them to each process, a terminal's Ctrl-C too."""
    alone, helped = (list(load(folder, workers=0).train.epoch()), load(folder, workers=2).train)
    batches = helped.epoch()
    got = [next(batches), next(batches)]  # one of each worker
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for signum in STOPS:
            os.kill(worker.pid, signum)
    for worker in workers:
        worker.join(0.5)  # time to die in
    got += batches
    for (images, _), (expected, _) in zip(got, alone, strict=True):
        assert torch.equal(images, expected)


def test_order_and_augmentation_depend_on_epoch_and_image_alone(folder):
    train = load(folder, workers=0).train
    state = torch.get_rng_state()
    whole = list(train.epoch(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(labels) for _, labels in whole] == [5, 5, 2]
    rest = list(train.epoch(3, start=1))
    assert torch.equal(rest[0][0], whole[1][0])
    assert not torch.equal(next(train.epoch(4))[0], whole[0][0])
    halves = [next(train.to(torch.device("cpu"), Share(r, 2)).epoch(3))[0] for r in (0, 1)]
    assert torch.equal(halves[0], whole[0][0][0::2])
    assert torch.equal(halves[1], whole[0][0][1::2])


def test_every_seed_epoch_and_image_draws_its_own_numbers(folder):
    drawn, files = set(), [str(folder / "ant" / "0.jpg")] * 3
    for seed in (0, 1, 2, 20261128, 2**32 - 1):
        batches = FolderBatches(
            files, torch.arange(3), 1, INPUT, transform=lambda image: torch.rand(4), seed=seed
        )
        drawn |= {tuple(batches.files[e, i].tolist()) for e in range(3) for i in range(3)}
    assert len(drawn) == 5 * 3 * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_share_of_a_small_batch_may_be_empty(workers, folder):
    train = load(folder, workers=workers).train
    train.to(torch.device("cpu"), Share(rank=3, world=4))
    assert [len(images) for images, _ in train.epoch()] == [1, 1, 0]
    images, labels = list(train.epoch())[-1]
    assert images.shape == (0, 3, 16, 16) and images.dtype == torch.float32
    assert labels.shape == (0,) and labels.dtype == torch.int64


def test_evaluation_takes_the_centre(folder):
    file = folder / "ant" / "0.jpg"
    expected = v2.Compose(
        [v2.PILToTensor(), v2.RGB(), v2.Resize(20, antialias=True), v2.CenterCrop(16)]
    )(Image.open(file))
    labels = torch.zeros(1, dtype=torch.int64)
    batches = FolderBatches([str(file)], labels, 1, INPUT)
    assert torch.equal(batches.first(20).images[0], expected)
    images, _ = next(batches.epoch())
    torch.testing.assert_close(images[0], expected / 127.5 - 1)


def test_the_recipe_augments_to_what_its_model_takes():
    x = augmentation()(Image.new("RGB", (300, 200)))
    assert x.shape == (3, 224, 224) and x.dtype == torch.uint8


@pytest.mark.parametrize("damage", ["cut short", "no image"])
def test_damaged_image_is_named(damage, folder):
    file = folder / "bee" / "3.jpg"
    file.write_bytes(file.read_bytes()[:-200] if damage == "cut short" else b"GIF? no")
    with pytest.raises(UserError, match=r"image .*bee/3\.jpg cannot be read"):
        check_images([str(path) for path in folder.rglob("*.*")])
    with pytest.raises(UserError, match=r"bee/3\.jpg"):
        open_image(file)
    with pytest.raises(UserError, match=r"bee/3\.jpg"):
        load(folder)


def test_sixteen_bits_become_eight(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for ending in ("png", "tif"):
        file = tmp_path / f"deep.{ending}"
        Image.fromarray(grey.astype(np.uint16) * 257).save(file)
        assert np.array_equal(np.asarray(open_image(file)), grey)
    for dtype in (np.float32, np.int32):
        Image.fromarray(grey.astype(dtype)).save(file)
        with pytest.raises(UserError, match=r"deep\.tif cannot be read: .* no known range"):
            open_image(file)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_lies_on_white(mode, tmp_path):
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0] = 30, 30, 30, 255  # a row of grey ink over one of transparent black
    image, key = Image.fromarray(pixels).convert(mode), {}
    if mode in ("P", "L"):  # one level stands for what is transparent
        key = {"transparency": image.getpixel((0, 1))}
    image.save(tmp_path / "clear.png", **key)
    got = np.asarray(open_image(tmp_path / "clear.png").convert("RGB"))
    assert (got == np.array([[[30]], [[255]]])).all()


def test_too_few_photos_for_three_parts(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "1.png")
    with pytest.raises(UserError, match="must hold images to train, validate and test with, got 2"):
        load(tmp_path)


@pytest.mark.parametrize("place", ["", "101_ObjectCategories", "caltech101/101_ObjectCategories"])
def test_data_is_class_folders_or_torchvisions_layout(place, folder, tmp_path):
    root = tmp_path / "data"
    (root / place).mkdir(parents=True)
    for name in CLASSES:
        (folder / name).rename(root / place / name)
    if place:
        (root / "Annotations").mkdir()
    settings = recipes.get("caltech-transfer").Config(workers=0)
    assert load_data(settings, root).classes == list(CLASSES)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere must hold a folder of images for each class"):
        load(tmp_path / "nowhere")
    (tmp_path / "MNIST").mkdir()
    message = r"Found no valid file for the classes MNIST.* at a folder of class folders, or at one"
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    "names, message",
    [(["ant"], "two classes or more, got ant"), (["train", "val"], "for each class, got train")],
)
def test_folders_that_are_no_classes(names, message, tmp_path):
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "1.png")
    with pytest.raises(UserError, match=message):
        load(tmp_path)
