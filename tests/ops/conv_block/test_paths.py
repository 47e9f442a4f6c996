"""Which kernels conv_block takes."""

import pytest
import torch
from conv_block_problems import BY_NAME

from fastcls import build_info, functional

PATHS = {
    "deep2": "winograd",
    "wide2": "winograd",
    "winograd-map": "winograd",
    "mnist1": "direct",
    "cifar1": "direct",
    "overlap": "direct",
    "strided": "direct",
    "groups": "general",
    "wide-window": "general",
}


@pytest.mark.parametrize("name", PATHS)
def test_path_can_be_asked(name):
    case = BY_NAME[name]
    x, w = torch.zeros(1, case.in_channels, case.height, case.width), torch.zeros(case.weight_shape)
    fast = build_info()["cpu_isa"] != "scalar"
    path = functional.conv_block_path(x, w, **case.function_arguments)
    assert path == (PATHS[name] if fast else "general")
    double = functional.conv_block_path(x.double(), w.double(), **case.function_arguments)
    assert double == "general"
    if build_info()["cpu_isa"] == "avx512_bf16":  # pairs go without Winograd's algorithm
        pairs = functional.conv_block_path(x.bfloat16(), w, **case.function_arguments)
        assert pairs == path.replace("winograd", "direct")
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.conv_block_path(x, w, **case.function_arguments) == pairs


def test_path_of_what_is_no_call_is_an_error():
    x, w = torch.zeros(1, 3, 5, 5), torch.zeros(4, 3, 3, 3)
    with pytest.raises(TypeError, match="conv_block_path: input must be a Tensor, got list"):
        functional.conv_block_path([1.0], w)
    with pytest.raises(TypeError, match=r"conv_block_path: unexpected arguments \['size'\]"):
        functional.conv_block_path(x, w, size=3)
    with pytest.raises(RuntimeError, match="input must have 3 channels"):
        functional.conv_block_path(x[:, :2], w)


CUDA_PATHS = {
    "deep2": "gemm",
    "wide2": "gemm",
    "vgg2": "gemm",
    "mnist1": "direct",
    "cifar1": "direct",
    "alexnet1": "direct",
    "overlap": "direct",
    "odd-map": "gemm",
    "groups": "general",
    "wide-window": "general",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CUDA_PATHS)
def test_path_can_be_asked_on_cuda(name, dtype, tf32_device):
    case = BY_NAME[name]
    x = torch.zeros(1, case.in_channels, case.height, case.width, device=tf32_device)
    w = torch.zeros(case.weight_shape, device=tf32_device)
    for tensors in ((x.to(dtype), w.to(dtype)), (x.to(dtype), w)):
        path = functional.conv_block_path(*tensors, **case.function_arguments)
        assert path == CUDA_PATHS[name]
    double = functional.conv_block_path(x.double(), w.double(), **case.function_arguments)
    assert double == "general"


# The matrix unit of compute capability 7.5 reads float16 alone; floats have multiply-adds there.
@pytest.mark.parametrize("name", CUDA_PATHS)
def test_paths_of_an_older_gpu(name, tf32_device, monkeypatch):
    if tf32_device.type == "cuda":
        pytest.skip("an emulated one")
    monkeypatch.setenv("FASTCLS_EMULATED_ARCH", "75")
    case = BY_NAME[name]
    x = torch.zeros(1, case.in_channels, case.height, case.width)
    w = torch.zeros(case.weight_shape)
    for dtype, expected in (
        (torch.float32, CUDA_PATHS[name]),
        (torch.float16, CUDA_PATHS[name]),
        (torch.bfloat16, "general"),
    ):
        path = functional.conv_block_path(x.to(dtype), w, **case.function_arguments)
        assert path == expected, dtype


def test_more_output_channels_than_a_cuda_grid_has_blocks_for(tf32_device):
    x = torch.zeros(1, 16, 1, 1, device=tf32_device)
    few, many = (
        torch.zeros(1, 16, 1, 1, device=tf32_device).expand(n, -1, -1, -1)
        for n in (1 << 20, 1 << 23)
    )
    assert functional.conv_block_path(x, few, pool_size=None) == "gemm"
    assert functional.conv_block_path(x, many, pool_size=None) == "general"
