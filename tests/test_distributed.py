"""Several processes that share each batch come to the numbers of one."""

import pytest
import torch
from recipe_helpers import run_child, write_mnist
from torch import nn

from fastcls import distributed
from fastcls.distributed import Share
from fastcls.files import read_records

for extra in ("matplotlib", "torchvision", "tqdm"):
    pytest.importorskip(extra)

# 117 images in batches of 27 leave a last batch of 9, and shares of different sizes. Adam's first
# steps would blow rounding up: they divide each gradient by its own size.
IMAGES, EPOCHS = 117, 2
OPTIONS = ["--epochs", str(EPOCHS), "--batch-size", "27", "--lr", "0.1", "--clip-norm", "1"]
OPTIONS += ["--optimizer", "sgd"]

# `fastcls`, failing if it leaves threads of the processes' group behind: they may abort at exit.
ENDS_WITH_ITS_GROUP = """
import sys
from pathlib import Path
from fastcls.cli import main

status = main(sys.argv[1:])
threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
sys.exit(status or [name for name in threads if "gloo" in name] or None)
"""


def train(folder, processes=1, *options):
    """mnist-deep: augmentation, dropout and batch normalisation are all in it."""
    script = folder / "ends_with_its_group.py"
    script.write_text(ENDS_WITH_ITS_GROUP)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [str(script), "train", "mnist-deep", "--data", str(folder / "data")]
    command += ["--device", "cpu", "--threads", "1", "--out", str(folder / f"run{processes}")]
    child = run_child(*(launcher if processes > 1 else []), *command, *OPTIONS, *options)
    assert child.returncode == 0, child.stderr
    return child.stdout


def test_two_processes_come_to_the_losses_of_one(tmp_path):
    write_mnist(tmp_path / "data", IMAGES)
    train(tmp_path)
    printed = train(tmp_path, 2)
    assert printed.count("files in") == 1  # one process speaks
    one, two = (tmp_path / f"run{n}" for n in (1, 2))
    losses, losses2 = (
        torch.tensor([record["loss"] for record in read_records(folder / "steps.jsonl")])
        for folder in (one, two)
    )
    assert len(losses) == EPOCHS * 5
    torch.testing.assert_close(losses, losses2, rtol=1e-4, atol=0)
    for record, record2 in zip(
        *(read_records(f / "metrics.jsonl") for f in (one, two)), strict=True
    ):
        assert record["train_accuracy"] == record2["train_accuracy"]
        assert record["test_loss"] == pytest.approx(record2["test_loss"], rel=1e-4)
    models = [torch.load(f / "last.pt", weights_only=True)["model"] for f in (one, two)]
    assert list(models[0]) == list(models[1])
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-3, atol=1e-4)


def batch_of(size):
    batch = distributed._Batch()
    batch.size = size
    return batch


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_shares_of_a_dropout_mask_make_the_mask(memory_format):
    x = torch.ones(5, 3, 4, 4).contiguous(memory_format=memory_format)
    torch.manual_seed(0)
    whole = nn.Dropout(0.5)(x)
    for rank in range(6):  # the last one's share is empty
        share = Share(rank, 6)
        dropout = distributed._Dropout(nn.Dropout(0.5), share, batch_of(5))
        torch.manual_seed(0)
        assert torch.equal(dropout(x[share.rows(0, 5)]), whole[rank::6])


def test_batch_normalisation_of_an_empty_share(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    norm = distributed._BatchNorm(nn.BatchNorm2d(3), batch_of(1))
    assert norm(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
