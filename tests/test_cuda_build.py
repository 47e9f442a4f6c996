"""What the build says about the CUDA kernels, where there was an nvcc."""

import re

import pytest

from fastcls import build_info
from fastcls.info import kernel_resources

FAST = re.compile(r"\b(gemm_kernel|weight_grad_kernel)<")
SPLITS = re.compile(r"\bweight_grad_kernel<[^<]*Tf32x3Math")


@pytest.fixture
def resources():
    if not build_info()["cuda_archs"]:
        pytest.skip("built without nvcc")
    return kernel_resources()


def test_every_kernel_is_there_for_every_architecture(resources):
    kernels = {}
    for name in resources:
        arch, kernel = name.split(" ", 1)
        kernels.setdefault(arch, set()).add(re.sub(r"_GLOBAL__N__\w+", "", kernel))
    archs = {f"sm_{a.removesuffix('+PTX').replace('.', '')}" for a in build_info()["cuda_archs"]}
    assert set(kernels) == archs
    assert len({len(found) for found in kernels.values()}) == 1
    assert any(FAST.search(kernel) for kernel in kernels["sm_80"])


def test_fast_kernels_do_not_spill(resources):
    fast = {name: text for name, text in resources.items() if FAST.search(name)}
    assert fast
    spilled = {name: int(re.search(r"spilled (\d+) B", text)[1]) for name, text in fast.items()}
    # Parts of float32 operands take a few registers more than compute capability 8.0 has.
    most = {name: 44 if SPLITS.search(name) else 0 for name in fast}
    assert not {name: count for name, count in spilled.items() if count > most[name]}
