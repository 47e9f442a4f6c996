"""What was built and what runs."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version

import torch

from fastcls import _C, _load


def package_version() -> str:
    try:
        return version("fastcls")
    except PackageNotFoundError:  # built in place, not installed
        return "not installed"


def build_info() -> dict:
    """Versions, CUDA architectures compiled in, CPU instruction set in use, threads.

    Returns:
        A flat dict: ``fastcls``, ``torch``, ``python`` and ``compiler`` versions; ``cpu_isa``
        (``scalar``, ``avx2``, ``avx512`` or ``avx512_bf16``; ``FASTCLS_ISA`` overrides the choice);
        ``threads`` (PyTorch's intra-op threads, which the kernels use); ``cuda_archs`` (compute
        capabilities such as ``"9.0"``, the last with ``+PTX``, empty in a CPU-only build);
        ``cuda_kernels`` (``"loaded"`` or why not); ``torch_cuda`` (toolkit version of torch, or
        None); ``devices`` (names of the visible GPUs).
    """
    if _load.cuda_loaded:
        kernels = "loaded"
    elif _load.CUDA_LIBRARY is None:
        kernels = "not built (no nvcc, or FASTCLS_CUDA=0, when fastcls was installed)"
    else:
        kernels = f"not loaded: {_load.cuda_error or 'this torch has no CUDA'}"
    return {
        "fastcls": package_version(),
        "torch": torch.__version__,
        "python": python_version(),
        "compiler": _C.compiler,
        "cpu_isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "cuda_archs": [a for a in _C.cuda_archs.split(";") if a],
        "cuda_kernels": kernels,
        "torch_cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def kernel_resources() -> dict:
    """What each compiled CUDA kernel takes: ``{"sm_90 kernel<...>(...)": "registers 128, ..."}``.

    As ptxas reported it when the package was built; empty in a CPU-only build. Shared memory that a
    launch asks for is not in it: it depends on the shape.
    """
    report = Path(__file__).with_name("cuda_resources.txt")
    lines = report.read_text().splitlines() if report.exists() else []
    return dict(line.split("\t", 1) for line in lines)
