"""The command line: what it prints, writes and returns, and its one-line errors."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcls
from fastcls import recipes
from fastcls.cli import main, pick_device
from fastcls.errors import UserError, import_extra
from fastcls.runs import RunFolder


def error_of(capsys, *arguments):
    """The error line of a command that must fail."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastcls: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_trains_and_tells(tmp_path, capsys):
    for extra in ("matplotlib", "sklearn", "tqdm"):
        pytest.importorskip(extra)
    out = tmp_path / "run"
    options = ["--epochs", "2", "--batch-size", "256", "--lr", "0.002", "--seed", "4"]
    command = ["train", "digits", "--out", str(out), "--device", "cpu", "--layers", "native"]
    assert main(command + options) == 0
    printed = capsys.readouterr()
    assert "epoch  train loss  train accuracy  test loss  test accuracy" in printed.out
    assert "of 360" in printed.out
    assert str(out) in printed.out
    assert printed.err == ""  # nobody watches, so there is no progress bar
    config = json.loads((out / "config.json").read_text())
    assert [config[k] for k in ("epochs", "batch_size", "lr", "seed")] == [2, 256, 0.002, 4]
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2

    assert "already holds a run" in error_of(capsys, *command)
    assert main([*command, "--resume", "--epochs", "3"]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_stopped_run_tells_what_continues_it(tmp_path, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr("fastcls.cli.run", lambda *_, **options: given.update(options))
    monkeypatch.setattr("fastcls.cli.set_threads", lambda count: given.update(threads=count))
    options = ["--data", str(tmp_path / "my data"), "--device", "cpu", "--threads", "2"]
    command = ["train", "digits", "--out", str(tmp_path / "it's"), *options, "--tensorboard"]

    def told():
        assert main([*command, "--lr", "0.1"]) == 130
        text = capsys.readouterr().out
        assert text.startswith("continue with: ")
        return shlex.split(text.removeprefix("continue with: "))

    assert told() == ["fastcls", *command[:2], "--resume", *command[2:]]
    monkeypatch.setattr(sys, "argv", ["/here/fastcls/__main__.py"])
    assert told()[:4] == [sys.executable, "-m", "fastcls", "train"]
    monkeypatch.setattr(sys, "argv", [".venv/bin/fastcls"])
    assert told()[:2] == [".venv/bin/fastcls", "train"]
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert told()[:6] == ["torchrun", "--nproc-per-node", "3", "-m", "fastcls", "train"]
    monkeypatch.setenv("RANK", "1")
    assert main(command) == 130
    assert capsys.readouterr().out == ""


def test_unknown_recipe_lists_all(capsys):
    assert "caltech-transfer, cifar-cnn, digits, fashion-softmax, mnist-cnn" in error_of(
        capsys, "train", "imagenet"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train"], "RECIPE"),
        (["tarin"], "tarin"),
        (["train", "digits", "--epochs", "many"], "--epochs"),
        (["train", "digits", "--epochs", "0"], "epochs must be at least 1"),
        (["train", "digits", "--layers", "fussed"], "fussed"),
        (["train", "digits", "--weights", "none"], "recipe digits has no --weights"),
        (["train", "digits", "--threads", "0"], "--threads must be at least 1"),
        (["train", "digits", "--resume"], "--resume needs --out"),
        (["train", "digits", "--device", "tpu"], "--device must be"),
        (["train", "digits", "--threads", "100000"], "--threads must be at most 1024"),
        (["compare", "digits", "--seed", str(2**32 - 1), "--seeds", "2"], "seed must be in"),
        (["train", "digits", "--device", "cuda:99"], "CUDA device"),
        (["compare", "digits", "--patience", "2"], "--patience"),
    ],
)
def test_mistakes_take_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *arguments)
    assert not any(tmp_path.iterdir())


def test_missing_data_takes_one_line(capsys, tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def no_network(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", no_network)
    out = tmp_path / "run"
    arguments = ["train", "mnist-cnn", "--data", str(tmp_path / "data"), "--out", str(out)]
    assert "Two ways to get it" in error_of(capsys, *arguments)
    assert not out.exists()


def test_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "run")
    assert "file" in error_of(capsys, "train", "digits", "--layers", "native", "--out", out)


def test_missing_extra_names_the_command():
    with pytest.raises(UserError, match=r"no_such_extra .* pip install 'fastcls\[train\]'"):
        import_extra("no_such_extra.part")


def test_auto_device_is_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto", "fused") == "cpu"
    with pytest.raises(UserError, match="torch finds 0 CUDA device"):
        pick_device("cuda", "fused")


def test_each_process_tells_its_own_error(monkeypatch, capsys):
    for extra in ("matplotlib", "tqdm"):
        pytest.importorskip(extra)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "RANK": "5", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["train", "digits", "--layers", "native", "--device", "cuda"]) == 2
    message = "fastcls, process 5: no GPU of its own: process 1 of a machine with 1\n"
    assert capsys.readouterr().err == message


def test_the_cpu_has_no_numbers():
    assert pick_device("cpu:0", "fused") == "cpu"


def test_no_fused_layers_on_cuda_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("fastcls.cli.build_info", lambda: {"cuda_kernels": "not built"})
    assert pick_device("auto", "fused") == "cpu"
    assert pick_device("auto", "native") == "cuda"
    with pytest.raises(UserError, match="the CUDA kernels are not built"):
        pick_device("cuda", "fused")


def test_a_resumed_run_needs_kernels_for_its_own_layers(tmp_path, monkeypatch):
    RunFolder(tmp_path).write_config("digits", recipes.get("digits").Config(layers="native"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("fastcls.cli.build_info", lambda: {"cuda_kernels": "not built"})
    asked = []
    monkeypatch.setattr("fastcls.cli.run", lambda *_, device, **__: asked.append(device) or True)
    command = ["train", "digits", "--out", str(tmp_path), "--resume", "--device", "cuda"]
    assert main(command) == 0
    assert asked == ["cuda"]
    assert main([*command, "--layers", "fused"]) != 0


def test_version(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"fastcls {fastcls.__version__}\n"
    assert fastcls.__version__ == fastcls.build_info()["fastcls"]


def test_info_as_a_module():
    command = [sys.executable, "-m", "fastcls", "info"]
    # Not in the root, whose fastcls/ would hide the installed one.
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    printed = run.stdout
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines() if " " in line)
    assert lines["torch"].strip() == torch.__version__
    assert "cpu_isa" in lines and "cuda_archs" in lines
