"""Where the tests of conv_block run: CPU, GPU, and the CUDA kernels on the host."""

import pytest
import torch
from conv_block_problems import DTYPES
from emulator import build as emulator

from fastcls.ops import conv_block as op


@pytest.fixture(params=["cpu", "cuda-emulated", "cuda-7.5-emulated", "cuda"])
def device(request, monkeypatch):
    """Where the tensors are; emulated, CUDA kernels run on tensors of the CPU."""
    return use_device(request.param, monkeypatch, getattr(request.node, "callspec", None))


@pytest.fixture(params=["cuda-emulated", "cuda"])
def tf32_device(request, monkeypatch):
    """Where float32 products may round their operands to tf32."""
    device = use_device(request.param, monkeypatch)
    monkeypatch.setattr(op, "_allow_tf32", lambda x: x.dtype == torch.float32)
    return device


def use_device(name, monkeypatch, callspec=None):
    if name != "cpu" and callspec and not worth_running(**callspec.params):
        pytest.skip("CUDA: every layout with two dtypes, every dtype with two layouts")
    if name == "cuda-7.5-emulated":
        given = {"dtypes": DTYPES["float32"], "layout": "channels_last"} | callspec.params
        if given["dtypes"] != DTYPES["float32"] or given["layout"] != "channels_last":
            pytest.skip("of its own it has multiply-adds of float32: one layout shows them")
        monkeypatch.setenv("FASTCLS_EMULATED_ARCH", "75")
    if name.endswith("emulated"):
        monkeypatch.setattr(op, "_ops", emulator.load())
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        # Through the older of two interfaces: with the newer, what reads the older one raises.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(name)


def worth_running(layout=None, dtypes=None, **_):
    many_layouts = (DTYPES["float32"], DTYPES["bfloat16-float32"])
    return layout in (None, "contiguous", "channels_last") or dtypes in (None, *many_layouts)
