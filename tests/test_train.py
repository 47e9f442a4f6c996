"""Training: accuracy, fused against native, and runs that are broken off and resumed."""

import json
import math
import os
import re
import signal
from itertools import islice
from pathlib import Path

import pytest
import torch
from recipe_helpers import SPEEDS, SmallVgg, assert_same_numbers, run_child

from fastcls import recipes
from fastcls.config import OPTIMIZERS, SCHEDULES
from fastcls.errors import UserError
from fastcls.files import read_records, write_atomically
from fastcls.models import LAYERS
from fastcls.runs import RunFolder, run
from fastcls.signals import STOPS, stop_signals
from fastcls.summary import Outcome
from fastcls.train import Trainer

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

CPU = torch.device("cpu")
LAYER_NAMES = ("fused", "native")
METRICS = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"]
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
    return Trainer(module, config, module.load_data(config, root), CPU)


def first_losses(trainer, steps):
    trainer.model.train()
    for images, labels in islice(trainer.data.train.epoch(), steps):
        trainer.train_step(images, labels)
    return trainer.losses[:steps]


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
    """Rounding grows tenfold in a dozen steps: no further apart than by PyTorch's two libraries."""
    root = os.environ.get("FASTCLS_DATA")
    if not root:
        pytest.skip("set FASTCLS_DATA to a folder with MNIST and CIFAR-10")

    def losses(layers):
        return first_losses(trainer(recipe, Path(root), layers=layers, batch_size=20), 100)

    fused, native = losses("fused"), losses("native")
    with torch.backends.mkldnn.flags(enabled=False):
        other = losses("native")
    torch.testing.assert_close(fused[:50], native[:50], rtol=1e-4, atol=0)
    assert relative_difference(fused, native) <= max(1e-3, relative_difference(other, native))


def relative_difference(ours, native):
    """The greatest one."""
    ours, native = torch.as_tensor(ours), torch.as_tensor(native)
    return ((ours - native).abs() / native.abs()).max()


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


# The rates of a run of six steps that begins at 1, each in the middle of its step.
RATES = {
    "constant": [1, 1, 1, 1, 1, 1],
    "cosine": [0.98296, 0.85355, 0.62941, 0.37059, 0.14645, 0.01704],
    "linear": [11 / 12, 9 / 12, 7 / 12, 5 / 12, 3 / 12, 1 / 12],
    "one-cycle": [0.27778, 0.83333, 0.93301, 0.64738, 0.28306, 0.03457],
    "step": [1, 1, 0.1, 0.1, 0.01, 0.01],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_step_has_the_rate_of_its_middle(name):
    digits = trainer(layers="native", epochs=2, batch_size=500, lr=1.0, schedule=name)
    rates = []
    digits.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    for _ in range(2):
        digits.train_epoch()
        digits.finish_epoch()
    assert rates == pytest.approx(RATES[name], rel=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
        ({"clip_norm": 0.0}, "clip_norm must be a positive number, got 0.0"),
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"label_smoothing": 2.0}, "label_smoothing must be in"),
        ({"schedule": "cosin"}, "schedule must be one of constant, cosine,"),
        ({"lr": math.nan}, "lr must be a positive number, got nan"),
        ({"seed": -1}, "seed must be in"),
        ({"optimizer": "sdg"}, "optimizer must be one of sgd, nesterov, adam, adamw; got 'sdg'"),
        ({"layers": "fussed"}, "layers must be one of fused, native; got 'fussed'"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        recipes.get("digits").Config(**change)


def test_run_folder(whole):
    names = ["best.pt", "classes.png", "config.json", "confusion.png", "curves.png", "last.pt"]
    names += ["metrics.jsonl", "predictions.png", "steps.jsonl", "summary.json"]
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


def test_summary_is_of_the_best_model(whole):
    summary = json.loads((whole / "summary.json").read_text())
    best = min(read_records(whole / "metrics.jsonl"), key=lambda record: record["test_loss"])
    assert summary["best_epoch"] == best["epoch"]
    assert summary["test_loss"] == pytest.approx(best["test_loss"])
    assert summary["test_accuracy"] == best["test_accuracy"]
    classes = summary["classes"]
    assert sum(c["trained"] for c in classes) == 1437
    assert sum(c["tested"] for c in classes) == 360
    assert sum(c["right"] for c in classes) == round(360 * best["test_accuracy"])


def test_right_predictions_are_counted_by_one_rule():
    """Of equal logits, of which bfloat16 has many, the first class counts; with a NaN none does."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 25, generator=generator).round()
    labels = torch.arange(300) % 25
    logits[:100].scatter_(1, labels[:100, None], 2)  # among the greatest, not the first of them
    logits[:20] = math.nan
    outcome = Outcome(logits, labels, labels, [str(i) for i in range(25)])
    order = logits[20:].sort(dim=1, descending=True, stable=True).indices
    for k in (1, 5):
        assert outcome.top(k) == (order[:, :k] == labels[20:, None]).sum()
    hits = [LAYERS[name].cross_entropy_with_hits(logits, labels)[1].item() for name in LAYER_NAMES]
    assert hits == [outcome.top(1)] * 2
    classes = outcome.per_class()
    assert sum(c.right for c in classes) == outcome.top(1)
    assert [c.tested for c in classes] == [12] * 25
    assert outcome.confusion().sum() == 280


def test_patience_stops_early_and_restores_the_best_weights(tmp_path, capsys):
    # Steps this large ruin the model from some epoch on.
    changes = {"epochs": 30, "patience": 2, "lr": 0.08, "schedule": "constant", "batch_size": 64}
    assert run("digits", tmp_path / "run", **changes)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    losses = [record["test_loss"] for record in records]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 30
    assert losses[-1] > losses[best]
    assert "stopped early: 2 epochs without a better one" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["best_epoch"] == best + 1
    assert summary["test_loss"] == pytest.approx(losses[best])
    assert run("digits", tmp_path / "run", resume=True)  # nothing is left to do
    assert read_records(tmp_path / "run" / "metrics.jsonl") == records


def test_clipping_bounds_the_step():
    clipped, free = (
        trainer(layers="native", optimizer="sgd", momentum=0.0, lr=1.0, clip_norm=norm)
        for norm in (0.01, None)
    )
    lengths = []
    for digits in (clipped, free):
        before = [p.detach().clone() for p in digits.model.parameters()]
        digits.config.schedule = "constant"
        first_losses(digits, 1)
        steps = zip(digits.model.parameters(), before, strict=True)
        lengths.append(sum((p - b).square().sum() for p, b in steps).sqrt().item())
    assert lengths[0] == pytest.approx(0.01, rel=1e-3)
    assert lengths[1] > 0.1


def test_smoothing_is_for_training_alone():
    plain, smoothed = (trainer(layers="native", label_smoothing=s) for s in (0.0, 0.2))
    assert plain.evaluate(plain.data.test) == smoothed.evaluate(smoothed.data.test)
    assert not torch.equal(first_losses(plain, 3), first_losses(smoothed, 3))


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run("digits", tmp_path / "run", tensorboard=True, **BRIEF | {"epochs": 1})
    run("digits", tmp_path / "run", tensorboard=True, resume=True, epochs=2)
    events = loading.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("test_loss")]
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert written == [(r["epoch"], pytest.approx(r["test_loss"])) for r in records]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("amp", [False, True])
def test_graphed_steps_give_the_losses_of_plain_ones(optimizer, amp):
    losses = []
    for graphed in (False, True):
        module = recipes.get("digits")
        changes = {"optimizer": optimizer, "amp": amp, "lr": 0.003, "cuda_graph": graphed}
        config = module.Config(epochs=2, layers="native", clip_norm=1.0, **changes)
        told = []
        digits = Trainer(
            module, config, module.load_data(config, Path()), torch.device("cuda"), tell=told.append
        )
        epochs = []
        for _ in range(2):  # the second epoch replays after evaluation and an odd last batch
            digits.train_epoch()
            epochs += digits.finish_epoch()[1]
        losses.append(torch.tensor(epochs))
        assert not told
        if graphed:
            assert digits._run_step.graph is not None
    torch.testing.assert_close(*losses, rtol=1e-3 if amp else 1e-5, atol=1e-5)


def test_used_folder_is_refused(whole):
    before = {file: file.read_bytes() for file in whole.iterdir()}
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        run("digits", whole, **BRIEF)
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


# Each kills its own process, as a power cut would: no handler, no clean-up.
KILLS = {
    "in an epoch": """
train_step, calls = Trainer.train_step, []
def killed(self, *batch):
    calls.append(0)
    if len(calls) == 17:  # in the second epoch
        kill()
    train_step(self, *batch)
Trainer.train_step = killed
""",
    "writing last.pt": """
save, calls = torch.save, []
def killed(state, path):
    save(state, path)
    if path.name == "last.pt.new":
        calls.append(0)
        if len(calls) == 3:  # the first is of the beginning, the second of the first epoch
            path.write_bytes(path.read_bytes()[:5000])
            kill()
torch.save = killed
""",
    "writing best.pt": """
save, calls = torch.save, []
def killed(state, path):
    save(state, path)
    if path.name == "best.pt.new":
        calls.append(0)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:5000])
            kill()
torch.save = killed
""",
}


@pytest.mark.parametrize("when", KILLS)
def test_resume_after_kill_9(when, whole, tmp_path):
    script = (
        "import os, signal, torch\n"
        "from fastcls.train import Trainer\n"
        "from fastcls.runs import run\n"
        "torch.set_num_threads(1)\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{KILLS[when]}\n"
        f"run('digits', {str(tmp_path / 'run')!r}, **{BRIEF})\n"
    )
    assert run_child("-c", script).returncode == -signal.SIGKILL
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) >= 1
    assert run("digits", tmp_path / "run", resume=True)
    assert_same_numbers(tmp_path / "run", whole)


# From the second epoch on no file may be longer than this many bytes.
@pytest.mark.parametrize(
    "size, reason",
    [(10_000, "disk may be full"), (3 * 40, "too large")],
    ids=["a checkpoint", "the records"],
)
def test_full_disk_is_told_and_nothing_is_lost(size, reason, whole, tmp_path):
    script = (
        "import resource, signal, sys, torch\n"
        "from fastcls import runs\n"
        "from fastcls.cli import main\n"
        "torch.set_num_threads(1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "epoch = runs.Records.epoch\n"
        "def full(self, metrics, *others):\n"
        "    if metrics['epoch'] == 2:\n"
        f"        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, -1))\n"
        "    epoch(self, metrics, *others)\n"
        "runs.Records.epoch = full\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    out = tmp_path / "run"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in BRIEF.items()]
    child = run_child("-c", script, "train", "digits", "--out", str(out), *options)
    assert child.returncode == 2, child.stderr
    named = rf"fastcls: {out}/\w+\.\w+ cannot be written: .*({reason}).*--resume\n"
    assert re.fullmatch(named, child.stderr)
    assert not list(out.glob("*.new"))
    assert torch.load(out / "last.pt", weights_only=True)["epoch"] == 1
    assert run("digits", out, resume=True)
    assert_same_numbers(out, whole)


@pytest.fixture
def heard():
    """The end of the terminal, which is ignored where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("signum", STOPS, ids=lambda s: s.name)
def test_signals_save_the_running_epoch(signum, heard, whole, tmp_path, monkeypatch, capsys):
    train_step, calls = Trainer.train_step, []

    def press(self, *batch):
        train_step(self, *batch)
        calls.append(batch)
        if len(calls) == STEPS + 5:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(Trainer, "train_step", press)
    handlers = [signal.getsignal(s) for s in STOPS]
    assert not run("digits", tmp_path / "run", **BRIEF)
    assert [signal.getsignal(s) for s in STOPS] == handlers
    assert f"stopped and saved in {tmp_path / 'run'}\n" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 5
    assert run("digits", tmp_path / "run", resume=True)
    assert len(calls) == 3 * STEPS
    assert_same_numbers(tmp_path / "run", whole)


def test_only_a_second_ctrl_c_interrupts(monkeypatch):
    with pytest.raises(KeyboardInterrupt), stop_signals() as asked:
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)


def test_nohup_keeps_the_end_of_the_terminal_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resume_before_the_first_checkpoint(whole, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.write_config("digits", recipes.get("digits").Config(**BRIEF))
    assert run("digits", folder.path, resume=True)
    assert_same_numbers(folder.path, whole)


def test_resume_needs_no_first_weights(tmp_path, monkeypatch):
    """They are in the checkpoint; their file may be gone, or was named from another folder."""
    monkeypatch.setattr(pytest.importorskip("torchvision.models"), "vgg16", SmallVgg)
    photos = tmp_path / "caltech101" / "101_ObjectCategories"
    for name in ("ant", "bee"):
        (photos / name).mkdir(parents=True)
        for i in range(4):
            image = torch.randint(256, (40, 40, 3), dtype=torch.uint8)
            Image.fromarray(image.numpy()).save(photos / name / f"{i}.png")
    weights = tmp_path / "vgg.pt"
    torch.save(SmallVgg().state_dict(), weights)
    changes = {"batch_size": 2, "weights": str(weights), "workers": 0, "data": tmp_path}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for out, epochs in zip((whole, resumed), (2, 1), strict=True):
        assert run("caltech-transfer", out, epochs=epochs, **changes)
    weights.rename(tmp_path / "moved.pt")
    assert run("caltech-transfer", resumed, epochs=2, resume=True, data=tmp_path)
    assert_same_numbers(whole, resumed)
    assert json.loads((resumed / "config.json").read_text())["weights"] == str(weights)


def test_resume_may_train_longer(tmp_path):
    run("digits", tmp_path / "run", **BRIEF | {"epochs": 1})
    run("digits", tmp_path / "run", resume=True, epochs=2)
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 2


def test_resume_tells_where_the_schedule_goes_on(tmp_path, capsys):
    """One-cycle's rate is nearly zero at its end, which is its middle when twice as long."""
    run("digits", tmp_path / "run", **BRIEF | {"epochs": 1})
    run("digits", tmp_path / "run", resume=True, epochs=1)
    assert "schedule" not in capsys.readouterr().out
    run("digits", tmp_path / "run", resume=True, epochs=2)
    told = "the one-cycle schedule spans 2 epochs now, 1 before: the next learning rate is 0.0023\n"
    assert told in capsys.readouterr().out


def test_resume_drops_no_epochs(whole):
    before = {file: file.read_bytes() for file in whole.iterdir()}
    with pytest.raises(UserError, match="has 3 epochs already: epochs must be at least as many, "):
        run("digits", whole, resume=True, epochs=2)
    assert {file: file.read_bytes() for file in whole.iterdir()} == before


def test_a_run_that_diverges_says_so_once(tmp_path, capsys):
    assert run("digits", tmp_path / "run", **BRIEF | {"lr": 1e30, "optimizer": "sgd"})
    assert capsys.readouterr().out.count("warning: training diverged, its loss is nan: ") == 1


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
        write_atomically(file, fail)
    assert file.read_text() == "old"
