"""Damaged and hostile files, and folders that cannot be written: told in one line, never trusted.

Kills and full disks in the middle of a run are in test_train.py, damaged images in test_folders.py.
"""

import json
import os
import random
import resource
import shutil
import struct

import pytest
import torch
from recipe_helpers import run_child, write_mnist

from fastcls import plots, recipes, runs
from fastcls.cli import main
from fastcls.datasets import torchvision_set
from fastcls.errors import UserError
from fastcls.files import load_checkpoint, read_records
from fastcls.predict import Predictor
from fastcls.runs import RunFolder, run
from fastcls.train import Trainer

for extra in ("matplotlib", "sklearn", "torchvision", "tqdm"):
    pytest.importorskip(extra)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "digits"
    assert run("digits", folder, epochs=1, batch_size=256)
    return folder


@pytest.fixture
def small_files():
    """No file may be longer than 1000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_picture_without_room_is_named_and_the_one_before_stays(tmp_path, small_files):
    picture = tmp_path / "filters.png"
    picture.write_text("the one before")
    with pytest.raises(UserError, match=r"filters\.png cannot be written: .*too large"):
        plots.filters({"x": torch.ones(3, 3), "y": torch.eye(3)}, picture)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["the one before"]


@pytest.fixture
def copied(folder, tmp_path):
    return RunFolder(shutil.copytree(folder, tmp_path / "copy"))


def damaged(data, count, seed=0):
    """``count`` copies of ``data``, each cut short or with one bit flipped."""
    rng = random.Random(seed)
    for i in range(count):
        place = rng.randrange(len(data))
        if i % 4 == 0:
            yield data[:place]
        else:
            yield data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def test_damaged_checkpoint_is_refused_or_still_the_same(folder, tmp_path):
    images = torch.arange(3 * 64, dtype=torch.uint8).view(3, 1, 8, 8)
    expected = Predictor(folder / "best.pt")(images)
    data, refused = (folder / "best.pt").read_bytes(), 0
    for content in damaged(data, 120):
        file = tmp_path / "best.pt"
        file.write_bytes(content)
        try:
            predictor = Predictor(file)
        except UserError as error:
            assert str(file) in str(error)
            refused += 1
        else:  # a bit between the parts of the file, which nobody reads
            assert torch.equal(predictor(images), expected)
    assert refused > 60


def test_a_damaged_model_of_a_run_is_not_told_as_its_result(copied):
    data = copied.best.read_bytes()
    place = len(data) // 2  # in a weight
    copied.best.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
    with pytest.raises(UserError, match=r"best\.pt cannot be read: .* damaged"):
        run("digits", copied.path, resume=True)


def continued(copied):
    """The settings with which the run in this folder would be continued."""
    config = runs.configure("digits", copied, True, {})
    module = recipes.get("digits")
    trainer = Trainer(module, config, module.load_data(config, None), torch.device("cpu"))
    runs.continue_run(trainer, copied)
    return config


def test_damaged_config_is_refused_or_still_the_same(copied):
    expected = continued(copied)
    data, refused = copied.config.read_bytes(), 0
    for content in damaged(data, 100):
        copied.config.write_bytes(content)
        try:
            config = continued(copied)
        except UserError:
            refused += 1
        else:  # what a resumed run may change, or white space
            changed = {n for n in vars(config) if vars(config)[n] != vars(expected)[n]}
            assert changed <= set(runs.CHANGEABLE), content
    assert refused > 50


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": "3"}, r"config\.json is damaged: "),
        ({"lr": None}, r"config\.json is damaged: "),
        ({"lr": 1e-9}, r"config\.json is damaged: lr is 1e-09, and"),
        ({"batch_size": 128}, r"batch_size is 128, and 256 in the checkpoint last\.pt"),
        ({"recipe": 7}, "another recipe"),
    ],
)
def test_config_that_is_not_the_runs_is_named(change, message, copied):
    copied.config.write_text(json.dumps(json.loads(copied.config.read_text()) | change))
    with pytest.raises(UserError, match=message):
        run("digits", copied.path, resume=True)


def test_config_without_settings(copied):
    copied.config.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"config\.json cannot be read: it holds no settings"):
        run("digits", copied.path, resume=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl"])
def test_damaged_records_are_named(name, copied):
    file = copied.path / name
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    with pytest.raises(UserError, match=rf"{name} cannot be read: line 1"):
        read_records(file)


def test_a_checkpoint_of_something_else_is_not_continued(copied):
    shutil.copy(copied.best, copied.last)  # without the optimiser
    with pytest.raises(
        UserError, match=r"last\.pt is no checkpoint to continue from \('optimizer'"
    ):
        run("digits", copied.path, resume=True)


def test_weights_of_another_model_are_told(folder, tmp_path):
    state = torch.load(folder / "best.pt", weights_only=True)
    state["model"].popitem()
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt has the weights of another model"):
        Predictor(tmp_path / "other.pt")


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "pickle"])
def test_code_in_a_checkpoint_is_never_run(as_zip, folder, tmp_path):
    state = torch.load(folder / "best.pt", weights_only=True)
    state["classes"] = Malicious(tmp_path / "made")
    file = tmp_path / "best.pt"
    torch.save(state, file, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"checkpoint .*best\.pt cannot be read"):
        load_checkpoint(file, torch.device("cpu"))
    assert not (tmp_path / "made").exists()
    torch.load(file, weights_only=False)  # it is what it says
    assert (tmp_path / "made").exists()


def test_every_bit_of_an_idx_header_counts(tmp_path):
    write_mnist(tmp_path)
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        file = tmp_path / "MNIST" / "raw" / name
        data = file.read_bytes()
        for bit in range(8 * (16 if "images" in name else 8)):
            head = bytearray(data)
            head[bit // 8] ^= 1 << bit % 8
            file.write_bytes(head)
            with pytest.raises(UserError, match=rf"MNIST in .* is damaged: {name}"):
                torchvision_set("MNIST", tmp_path)
        file.write_bytes(data)
    torchvision_set("MNIST", tmp_path)


def test_labels_outside_the_classes_are_damage(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(UserError, match=r"MNIST in .* is damaged: a label that is none of its"):
        torchvision_set("MNIST", tmp_path)


@pytest.mark.parametrize(
    "copied, over, message",
    [
        ("t10k-labels-idx1", "train-labels-idx1", "6 images and 4 labels to train with"),
        ("t10k-images-idx3", "train-images-idx3", "4 images and 6 labels to train with"),
        ("train-labels-idx1", "t10k-labels-idx1", "4 images and 6 labels to test with"),
        ("train-labels-idx1", "train-images-idx3", r"train-images-idx3-ubyte \(no images of"),
        ("train-images-idx3", "train-labels-idx1", r"train-labels-idx1-ubyte \(no labels of"),
    ],
)
def test_files_in_each_others_places_are_damage(copied, over, message, tmp_path):
    """Each of them is whole."""
    write_mnist(tmp_path / "more")
    write_mnist(tmp_path, 4)
    raw, more = (root / "MNIST" / "raw" for root in (tmp_path, tmp_path / "more"))
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        shutil.copy(more / name, raw)
    shutil.copy(raw / f"{copied}-ubyte", raw / f"{over}-ubyte")
    with pytest.raises(UserError, match=f"MNIST in .* is damaged: {message}"):
        torchvision_set("MNIST", tmp_path)


@pytest.mark.parametrize("size, count", [(27, 3), (28, 0)])
def test_images_of_another_size_or_none_at_all(size, count, tmp_path):
    write_mnist(tmp_path, count)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(struct.pack(">4i", 0x803, count, size, size) + bytes(count * size * size))
    with pytest.raises(UserError, match=rf"damaged: {file.name} \(no images of this data set"):
        torchvision_set("MNIST", tmp_path)


def test_a_file_in_the_place_of_the_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["train", "digits", "--out", str(tmp_path / "file" / "run"), "--epochs", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcls: ") and str(tmp_path / "file") in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_write_permission(tmp_path):
    """Root, who may write anywhere, is held to permissions without CAP_DAC_OVERRIDE."""
    script = (
        "import ctypes, os, sys\n"
        "ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)\n"  # PR_CAPBSET_DROP: it is gone after exec
        "os.execv(sys.executable, [sys.executable, '-m', 'fastcls', *sys.argv[1:]])\n"
    )
    (tmp_path / "theirs").mkdir(mode=0o555)
    out = tmp_path / "theirs" / "run"
    child = run_child("-c", script, "train", "digits", "--out", str(out), "--epochs", "1")
    assert child.returncode == 2, child.stderr
    assert child.stderr.startswith("fastcls: [Errno 13] Permission denied: ")
    assert child.stderr.count("\n") == 1 and "Traceback" not in child.stderr
