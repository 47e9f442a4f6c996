"""Runs a command with CPU kernels that a sanitizer of the compiler watches:

    python tests/sanitizers/run.py address pytest tests/ops tests/fuzz -k "not emulated"
    python tests/sanitizers/run.py thread pytest tests/ops -k "cpu and bit_for_bit"

"address" is AddressSanitizer and UndefinedBehaviorSanitizer, for the emulated CUDA kernels too.
"thread" is ThreadSanitizer. It does not know OpenMP, which PyTorch's threads are: PyTorch's own ops
run on one thread, and ours share their work among four ``std::thread`` (threads.cpp).
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from emulator.build import (  # noqa: E402
    CSRC,
    SANITIZE,
    build,
    sanitizer_environment,
    torch_flags,
    torch_home,
)

FLAGS = {"address": SANITIZE, "thread": ["-fsanitize=thread", "-O1"]}


def build_module(kind):
    """``fastcls._C`` with the sanitizer in it."""
    sources = [*sorted(CSRC.glob("*.cpp")), *sorted(CSRC.glob("cpu/*.cpp"))]
    flags = [
        *torch_flags(),
        f"-isystem{pybind11.get_include()}",
        f"-isystem{sysconfig.get_path('include')}",
        '-DFASTCLS_CUDA_ARCHS=""',
        *FLAGS[kind],
    ]
    libraries = [*FLAGS[kind], f"-L{torch_home()}/lib", "-ltorch_cpu"]
    if kind == "thread":
        sources.append(HERE / "threads.cpp")
        libraries.append("-Wl,-Bsymbolic")  # its torch_parallel_for, not PyTorch's
    return build(f"fastcls_{kind}", sources, flags, libraries)


def package_with(module, folder):
    """A package ``fastcls`` in ``folder``: that of this checkout, with ``module`` for its _C."""
    package = folder / "fastcls"
    package.mkdir(parents=True, exist_ok=True)
    wanted = {f.name: f for f in (ROOT / "fastcls").iterdir() if f.suffix != ".so"}
    wanted["_C" + sysconfig.get_config_var("EXT_SUFFIX")] = module
    for old in package.iterdir():
        old.unlink()
    for name, file in wanted.items():
        if name != "__pycache__":
            (package / name).symlink_to(file)


def environment(kind, folder):
    if kind == "address":
        variables = sanitizer_environment()
    else:
        runtimes = [
            subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
            for name in ("libtsan.so", "libstdc++.so")
        ]
        variables = {
            **os.environ,
            "LD_PRELOAD": ":".join(runtimes),
            "TSAN_OPTIONS": "ignore_noninstrumented_modules=1",
            "OMP_NUM_THREADS": "1",
        }
    paths = [str(folder), *filter(None, [variables.get("PYTHONPATH")])]
    return variables | {"PYTHONPATH": os.pathsep.join(paths)}


def main(kind, *command):
    folder = ROOT / "build" / "sanitized" / kind
    package_with(build_module(kind), folder)
    # ThreadSanitizer knows few layouts of the address space: -R keeps to one of them.
    layout = ["setarch", "-R"] if kind == "thread" else []
    command = [*layout, *command]
    os.execvpe(command[0], command, environment(kind, folder))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in FLAGS:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
