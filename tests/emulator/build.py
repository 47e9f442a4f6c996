"""Builds the CUDA kernels for the host with g++; registers them as ``torch.ops.fastcls_emulated``.

Those ops take CPU tensors. Run as a program, this file runs a command with AddressSanitizer, which
then also watches the emulated kernels:

    python tests/emulator/build.py pytest tests -k emulated
"""

import fcntl
import functools
import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = Path(os.environ.get("FASTCLS_EMULATED_CSRC", HERE.parents[1] / "csrc"))
BUILD = HERE.parents[1] / "build" / "emulator"  # objects and libraries, named by their content

# Undefined behaviour ends the process, as a wrong address does. Left out: vptr, which needs more
# RTTI than torch has, and what AddressSanitizer finds too, at several times the compile time.
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=vptr,null,object-size,pointer-overflow",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
]


def under_sanitizer():
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def sanitizer_environment():
    """Environment in which a Python program can load a library built with AddressSanitizer."""
    # libstdc++ too: AddressSanitizer looks for the C++ throw when it starts, and Python has none.
    runtimes = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Python and torch leave much to the end of the process: leaks say nothing here.
    return {**os.environ, "LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}


def _run(command):
    plain = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # a sanitizer slows g++ down
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    if done.returncode:
        raise RuntimeError(
            f"emulator build failed: {' '.join(command)}\n{done.stdout}{done.stderr}"
        )


def _digest(flags, *files):
    digest = hashlib.sha256(repr(flags).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _with_headers(source):
    """The source and those of our headers that it includes, directly or not."""
    found, left = [], [source]
    while left:
        file = left.pop()
        if file in found:
            continue
        found.append(file)
        names = re.findall(r'^#include "(.+)"', file.read_text(), re.M)
        paths = [next((d / n for d in (HERE, CSRC) if (d / n).exists()), None) for n in names]
        left += [path for path in paths if path]
    return sorted(found)


def _write(target, command):
    """Runs `command` + [target] unless that was done before; of several processes one does it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(f".partial{target.suffix}")
            _run([*command, str(partial)])
            partial.replace(target)
    return target


def _sanitize(source):
    """The emulator itself is not watched, which would take half the time of all; what it does in a
    kernel's memory stands in its header, and is part of the kernel."""
    return ["-DFASTCLS_WATCHED_STACKS"] if source.name == "emulator.cpp" else SANITIZE


def build(name, sources, flags=(), libraries=()):
    """Shared library of C++ sources (CUDA ones among them); cached by content."""
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", *flags]
    # The emulator's cuda/device.h and cuda/common.h are found before those of csrc.
    flags += ["-Wno-unknown-pragmas", f"-I{HERE}", f"-I{CSRC}"]

    def compiled(source):
        own = [*flags, *(_sanitize(source) * under_sanitizer())]
        named = [f for f in own if f != f"-I{CSRC}"]  # a copy of the same text is the same
        target = BUILD / f"{source.stem}-{_digest(named, *_with_headers(source))}.o"
        return _write(target, ["g++", *own, "-x", "c++", "-c", str(source), "-o"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(o) for o in pool.map(compiled, sources)]
    target = BUILD / f"{name}-{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}.so"
    link = ["g++", "-shared", *(SANITIZE * under_sanitizer()), *objects, *libraries]
    return _write(target, [*link, "-o"])


def torch_home():
    import torch

    return Path(torch.__file__).parent


def torch_flags():
    return [f"-isystem{torch_home()}/include", "-DTORCH_TARGET_VERSION=0x020A000000000000"]


def _define_ops(names):
    """The schemas of ``torch.ops.fastcls``, again in the emulator's namespace."""
    import torch

    library = torch.library.Library("fastcls_emulated", "DEF")
    for name in names:
        schema = str(getattr(torch.ops.fastcls, name).default._schema)
        library.define(schema.removeprefix("fastcls::"))
    return library


def load():
    """Builds and loads the emulated ops, once; returns ``torch.ops.fastcls_emulated``."""
    ops, error = _load()
    if error:
        raise error
    return ops


@functools.cache
def _load():
    """The ops and None, or None and the error: thousands of tests ask for them."""
    try:
        return _built_and_loaded(), None
    except (RuntimeError, OSError) as error:
        return None, error


def _built_and_loaded():
    import torch

    import fastcls  # noqa: F401  registers the schemas

    flags = [
        *torch_flags(),
        "-DFASTCLS_CUDA_NAMESPACE=fastcls_emulated",
        "-DFASTCLS_CUDA_KEY=CPU",
        "-DFASTCLS_POISON",  # of new tensors, see csrc/tensors.h
    ]
    sources = [*sorted(CSRC.glob("cuda/*.cu")), *sorted(CSRC.glob("cuda/*.cpp"))]
    sources.remove(CSRC / "cuda" / "common.cu")  # asks the driver
    sources.append(HERE / "emulator.cpp")
    path = build("fastcls_emulated", sources, flags, [f"-L{torch_home()}/lib", "-ltorch_cpu"])
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastcls::")]
    _load.library = _define_ops(sorted(n.removeprefix("fastcls::") for n in names))  # kept alive
    torch.ops.load_library(path)
    return torch.ops.fastcls_emulated


if __name__ == "__main__":
    os.execvpe(sys.argv[1], sys.argv[1:], sanitizer_environment())
