"""Loads the kernel libraries, which registers the ops under ``torch.ops.fastcls``."""

from pathlib import Path

import torch

try:
    from fastcls import _C as _C
except ImportError as error:
    raise ImportError(
        f"fastcls: the compiled module fastcls._C could not be loaded ({error}). "
        "Install the package with `pip install .`, or build it in place with `pip install -e .`."
    ) from error

# The CUDA library links libtorch_cuda, which a CPU-only torch does not have.
CUDA_LIBRARY = next(iter(sorted(Path(__file__).parent.glob("_cuda*.so"))), None)
cuda_loaded = False
cuda_error = None
if CUDA_LIBRARY is not None and torch.version.cuda is not None:
    try:
        torch.ops.load_library(CUDA_LIBRARY)
        cuda_loaded = True
    except OSError as error:  # told by build_info(); the CPU kernels work all the same
        cuda_error = str(error)
