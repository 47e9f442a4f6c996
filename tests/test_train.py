"""Training: accuracy, fused against native, and runs that are broken off and resumed."""

import json
import math
import os
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch

from fastcls import recipes, runs
from fastcls.errors import UserError
from fastcls.runs import RunFolder, read_records, run
from fastcls.train import SCHEDULES, Trainer

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

CPU = torch.device("cpu")
LAYER_NAMES = ("fused", "native")
METRICS = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
SPEEDS = ["seconds", "images_per_second"]
BRIEF = {"epochs": 3, "batch_size": 128, "layers": "native"}
STEPS = 12  # per epoch of a brief run


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Batches this small lose more than they gain by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(recipe="digits", root=Path(), **changes):
    module = recipes.get(recipe)
    config = module.Config(**changes)
    return Trainer(module, config, module.load_data(config, root, CPU), CPU)


def first_losses(trainer, steps):
    trainer.model.train()
    for images, labels in islice(trainer.data.train.epoch(), steps):
        trainer.train_step(images, labels)
    return trainer.losses[:steps]


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a brief run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run("digits", folder, **BRIEF)
    return folder


@pytest.mark.parametrize("layers", LAYER_NAMES)
def test_digits_learns(layers):
    digits = trainer(layers=layers, epochs=6)
    for _ in range(6):
        assert digits.train_epoch()
        digits.finish_epoch()
    assert digits.best_epoch()["test_accuracy"] >= 0.96


def test_fused_and_native_losses_agree():
    fused, native = (first_losses(trainer(layers=name, batch_size=14), 100) for name in LAYER_NAMES)
    torch.testing.assert_close(fused, native, rtol=1e-3, atol=0)


@pytest.mark.parametrize("recipe", ["mnist-cnn", "cifar-cnn"])
def test_fused_and_native_losses_agree_on_real_images(recipe):
    root = os.environ.get("FASTCLS_DATA")
    if not root:
        pytest.skip("set FASTCLS_DATA to a folder with MNIST and CIFAR-10")
    fused, native = (
        first_losses(trainer(recipe, Path(root), layers=name, batch_size=20), 100)
        for name in LAYER_NAMES
    )
    torch.testing.assert_close(fused, native, rtol=1e-3, atol=0)


@pytest.mark.parametrize("layers", LAYER_NAMES)
def test_amp_learns(layers):
    digits = trainer(layers=layers, amp=True, epochs=2, batch_size=64)
    losses = []
    for _ in range(2):
        digits.train_epoch()
        losses.append(digits.finish_epoch()[0]["train_loss"])
    assert losses[1] < losses[0]
    assert all(p.dtype == torch.float32 for p in digits.model.parameters())


def test_amp_computes_in_bfloat16():
    digits = trainer(layers="native", amp=True)
    seen = []
    digits.model.fc2.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    first_losses(digits, 1)
    assert seen == [torch.bfloat16]


def test_channels_last_changes_no_loss():
    plain, channels_last = (
        first_losses(trainer(layers="native", channels_last=flag), 10) for flag in (False, True)
    )
    torch.testing.assert_close(plain, channels_last, rtol=1e-4, atol=0)


def test_seed_decides_the_losses():
    first, again, other = (first_losses(trainer(layers="native", seed=s), 5) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_evaluation_has_no_dropout_and_every_image():
    digits = trainer(layers="native")
    digits.model.train()
    test = digits.data.test
    loss, accuracy = digits.evaluate(test)
    digits.model.eval()
    with torch.no_grad():
        logits = torch.cat([digits.model(images) for images, _ in test.epoch()])
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, test.labels).item())
    assert accuracy == (logits.argmax(1) == test.labels).sum().item() / len(test.labels)


def test_epoch_figures_are_means_over_images():
    digits = trainer(**BRIEF)
    digits.train_epoch()
    hits = digits.hits.item()
    metrics, losses = digits.finish_epoch()
    last = 1437 - 11 * 128
    expected = (128 * sum(losses[:-1]) + last * losses[-1]) / 1437
    assert metrics["train_loss"] == pytest.approx(expected)
    assert metrics["train_accuracy"] == hits / 1437


def test_validation_chooses_the_best_epoch():
    digits = trainer(layers="native")
    losses = [(0.3, 0.1), (math.nan, 0.3), (0.2, 0.2), (0.2, 0.0)]
    digits.history = [
        {"epoch": i, "val_loss": val, "test_loss": test} for i, (val, test) in enumerate(losses)
    ]
    assert digits.best_epoch()["epoch"] == 3
    digits.data.val = digits.data.test
    assert digits.best_epoch()["epoch"] == 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_between_nothing_and_all(name):
    factors = [SCHEDULES[name](i / 1000) for i in range(1, 1001)]
    assert min(factors) >= 0
    assert max(factors) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
        ({"lr": math.nan}, "lr must be a positive number, got nan"),
        ({"seed": -1}, "seed must be in"),
        ({"optimizer": "sdg"}, "optimizer must be one of sgd, adam; got 'sdg'"),
        ({"layers": "fussed"}, "layers must be one of fused, native; got 'fussed'"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        recipes.get("digits").Config(**change)


def test_run_folder(whole):
    names = ["best.pt", "config.json", "curves.png", "last.pt", "metrics.jsonl"]
    names += ["predictions.png", "steps.jsonl"]
    assert sorted(file.name for file in whole.iterdir()) == names
    metrics = read_records(whole / "metrics.jsonl")
    assert [list(record) for record in metrics] == [METRICS + SPEEDS] * 3
    assert [record["epoch"] for record in metrics] == [1, 2, 3]
    assert all(0 <= record["test_accuracy"] <= 1 for record in metrics)
    steps = read_records(whole / "steps.jsonl")
    assert [record["step"] for record in steps] == list(range(1, 3 * STEPS + 1))
    config = json.loads((whole / "config.json").read_text())
    assert config["recipe"] == "digits"
    assert BRIEF.items() <= config.items()


def test_best_checkpoint_is_of_the_best_epoch(whole):
    state = torch.load(whole / "best.pt", weights_only=True)
    digits = trainer(**BRIEF)
    digits.model.load_state_dict(state["model"])
    losses = [record["test_loss"] for record in read_records(whole / "metrics.jsonl")]
    assert digits.evaluate(digits.data.test)[0] == min(losses)


def test_used_folder_is_refused(whole):
    before = {file: file.read_bytes() for file in whole.iterdir()}
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        run("digits", whole, **BRIEF)
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


def test_resume_after_a_crash_gives_the_same_numbers(whole, tmp_path, monkeypatch):
    train_step, calls = Trainer.train_step, []

    def crash(self, *batch):
        calls.append(batch)
        if len(calls) == STEPS + 5:
            raise MemoryError
        train_step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", crash)
    with pytest.raises(MemoryError):
        run("digits", tmp_path / "run", **BRIEF)
    torch.rand(3)  # whatever happens in between
    assert run("digits", tmp_path / "run", resume=True)
    assert_same_numbers(tmp_path / "run", whole)


@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
def test_resume_after_a_crash_while_saving(file, whole, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def crash(state, path):
        save(state, path)
        if path.name == file + ".new":
            calls.append(path)
            if len(calls) == 2:
                path.write_bytes(path.read_bytes()[:1000])
                raise MemoryError

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(MemoryError):
        run("digits", tmp_path / "run", **BRIEF)
    assert run("digits", tmp_path / "run", resume=True)
    assert_same_numbers(tmp_path / "run", whole)


def test_ctrl_c_saves_the_running_epoch(whole, tmp_path, monkeypatch, capsys):
    train_step, calls = Trainer.train_step, []

    def press(self, *batch):
        train_step(self, *batch)
        calls.append(batch)
        if len(calls) == STEPS + 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "train_step", press)
    handler = signal.getsignal(signal.SIGINT)
    assert not run("digits", tmp_path / "run", **BRIEF)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "--resume --out" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 5
    assert run("digits", tmp_path / "run", resume=True)
    assert len(calls) == 3 * STEPS
    assert_same_numbers(tmp_path / "run", whole)


def test_resume_before_the_first_checkpoint(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_config("digits", recipes.get("digits").Config(**BRIEF))
    assert run("digits", folder.path, resume=True)
    assert_same_numbers(folder.path, whole)


def test_resume_may_train_longer(tmp_path):
    run("digits", tmp_path / "run", **BRIEF | {"epochs": 1})
    run("digits", tmp_path / "run", resume=True, epochs=2)
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    "recipe, changes, message",
    [
        ("digits", {"seed": 9}, "a resumed run keeps its settings: seed is 0, not 9"),
        ("mnist-cnn", {}, "another recipe than mnist-cnn"),
    ],
)
def test_resume_keeps_the_settings(recipe, changes, message, whole):
    with pytest.raises(UserError, match=message):
        run(recipe, whole, resume=True, **changes)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume"):
        run("digits", tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_damaged_checkpoint_is_named(tmp_path):
    run("digits", tmp_path / "run", **BRIEF | {"epochs": 1})
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"checkpoint .*last\.pt cannot be read"):
        run("digits", tmp_path / "run", resume=True)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        runs.write_atomically(file, fail)
    assert file.read_text() == "old"
