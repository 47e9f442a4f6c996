"""Fixtures shared by all tests."""

import gc
import os

import pytest
import torch


def pytest_configure():
    """Under pytest-xdist the processes share the cores: threads of their own would only wait."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))


def pytest_collection_finish():
    """Ten thousand tests are there to stay: garbage collection need not go over them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Every test that takes it runs on the CPU, and on CUDA where there is a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device(request.param)
