"""CUDA's kernels of cross_entropy, on the host where there is no GPU."""

import pytest
import torch
from emulator import build as emulator

from fastcls.ops import cross_entropy as op


@pytest.fixture(params=["emulated", "cuda"])
def cuda_kernels(request, monkeypatch):
    """Device whose tensors `cross_entropy` sends to the CUDA kernels."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return torch.device("cuda")
    monkeypatch.setattr(op, "_ops", emulator.load())
    monkeypatch.setattr(op, "_plain_cross_entropy", lambda *_: None)
    monkeypatch.setattr(op, "_on_cuda", lambda input: True)
    return torch.device("cpu")


@pytest.fixture(params=["rows", "gradient"])
def saved(request, monkeypatch):
    """What the forward pass saves on CUDA, whatever the size, where it has the choice."""
    monkeypatch.setattr(op, "_ONE_READ_BYTES", 0 if request.param == "gradient" else 2**60)
    return request.param
