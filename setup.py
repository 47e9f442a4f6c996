"""Build of the two kernel libraries; everything else about the package is in pyproject.toml.

    fastcls._C      pybind11 module: op schemas, CPU kernels, build info. Needs no CUDA library.
    fastcls/_cuda   the CUDA kernels, built where nvcc is; loaded only where torch has CUDA.

Both use PyTorch's stable ABI, so one build runs under every torch from 2.10 on.

Environment: FASTCLS_CUDA=auto|0|1 (1: no nvcc is an error), TORCH_CUDA_ARCH_LIST, DEBUG=1,
MAX_JOBS.

What each CUDA kernel takes of a multiprocessor, as ptxas reports it, is written to
fastcls/cuda_resources.txt; `fastcls info --kernels` shows it.
"""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pybind11
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020A000000000000"  # 2.10, the oldest torch with all we call
# Code for one architecture runs on those of the same major version that came later; PTX serves what
# is newer than all. Those that the compiler does not know are left out.
DEFAULT_ARCHS = ["7.5", "8.0", "9.0", "10.0", "12.0"]
NEWEST_PTX = 80  # nothing in the kernels asks for a newer architecture


def nvcc_output(nvcc, *args):
    return subprocess.run([nvcc, *args], capture_output=True, text=True, check=False)


def find_cuda_home():
    """Root of the CUDA toolkit, or None. The nvcc on PATH may be a wrapper: it knows its root."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return home if (Path(home) / "bin" / "nvcc").exists() else None
    dryrun = nvcc_output("nvcc", "--dryrun", "x.cu").stderr if shutil.which("nvcc") else ""
    if top := re.search(r"^#\$ TOP=(.*)$", dryrun, re.M):
        return str(Path(top[1]).resolve())
    return "/usr/local/cuda" if Path("/usr/local/cuda/bin/nvcc").exists() else None


def default_arch_list(cuda_home):
    listed = nvcc_output(f"{cuda_home}/bin/nvcc", "--list-gpu-arch").stdout.split()
    archs = [a for a in DEFAULT_ARCHS if f"compute_{a.replace('.', '')}" in listed]
    if not archs:
        raise SystemExit(
            f"{cuda_home}/bin/nvcc lists none of the architectures {', '.join(DEFAULT_ARCHS)}: "
            "set TORCH_CUDA_ARCH_LIST, or FASTCLS_CUDA=0 to build without CUDA"
        )
    return ";".join([*archs[:-1], archs[-1] + "+PTX"])


def choose_cuda():
    """CUDA toolkit root to build with, or None, from FASTCLS_CUDA and what is installed."""
    wanted = os.environ.get("FASTCLS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTCLS_CUDA: expected auto, 0 or 1, got {wanted!r}")
    home = None if wanted == "0" else find_cuda_home()
    if wanted == "1" and home is None:
        raise SystemExit("FASTCLS_CUDA=1, but no nvcc on PATH and none under CUDA_HOME")
    return home


CUDA_HOME = choose_cuda()
if CUDA_HOME:  # both are read when torch.utils.cpp_extension is imported or builds
    os.environ["CUDA_HOME"] = CUDA_HOME
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_arch_list(CUDA_HOME)

from torch.utils.cpp_extension import (  # noqa: E402
    BuildExtension,
    _get_cuda_arch_flags,
    include_paths,
    library_paths,
)

DEBUG = os.environ.get("DEBUG", "0") == "1"
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3"]
DEFINES = [
    ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
    ("FASTCLS_CUDA_ARCHS", f'"{os.environ.get("TORCH_CUDA_ARCH_LIST", "") if CUDA_HOME else ""}"'),
]


def architecture_flags():
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, all that is newer from one PTX.

    To make PTX of the kernels takes nvcc longer than to assemble it, so that one for each
    architecture, as torch would have it, doubles the time.
    """

    def shared(flag):
        return re.sub(r"compute_(\d+)a?", lambda m: f"compute_{min(int(m[1]), NEWEST_PTX)}", flag)

    return sorted({shared(flag) for flag in _get_cuda_arch_flags()})


def extension(name, sources, *, libraries, with_cuda=False):
    cuda_dirs, arch_flags = {"include": [], "lib": []}, []
    if with_cuda:
        arch_flags = architecture_flags()
        cuda_dirs = {"include": [f"{CUDA_HOME}/include"], "lib": [f"{CUDA_HOME}/lib64"]}
    # Python's own flags have -g, whose symbols would take ten times the room of the kernels.
    cxx = [*([] if DEBUG else ["-g0"]), *OPTIMISE, "-Wall", "-fvisibility=hidden"]
    return Extension(
        name,
        sorted(str(s) for s in sources),
        include_dirs=[
            str(ROOT / "csrc"),
            pybind11.get_include(),
            *include_paths(),
            *cuda_dirs["include"],
        ],
        library_dirs=[*library_paths(), *cuda_dirs["lib"]],
        libraries=libraries,
        define_macros=DEFINES + ([("USE_CUDA", None)] if with_cuda else []),
        extra_compile_args={
            "cxx": cxx,
            "nvcc": [*OPTIMISE, *arch_flags, "-Xptxas=-v", "-Xcompiler=-fvisibility=hidden"],
        },
        depends=[str(h) for h in Path("csrc").rglob("*.h")],
        language="c++",
    )


def extensions():
    built = [extension("fastcls._C", Path("csrc").glob("*.cpp"), libraries=["torch_cpu"])]
    built[0].sources += sorted(str(s) for s in Path("csrc/cpu").glob("*.cpp"))
    if CUDA_HOME:
        # cudart is linked statically: a dynamic one ties the wheel to one CUDA major version.
        libraries = ["torch_cpu", "torch_cuda", "cudart_static", "rt", "dl", "pthread"]
        sources = [*Path("csrc/cuda").glob("*.cu"), *Path("csrc/cuda").glob("*.cpp")]
        built.append(extension("fastcls._cuda", sources, libraries=libraries, with_cuda=True))
    return built


def summary():
    cuda = "none: CPU-only build (install nvcc, or set CUDA_HOME, for the CUDA kernels)"
    if CUDA_HOME:
        cuda = f"{CUDA_HOME}, architectures {os.environ['TORCH_CUDA_ARCH_LIST']}"
    kind = "debug" if DEBUG else "release"
    return f"fastcls: CPU kernels: yes; CUDA kernels: {cuda}; {kind} build"


@contextlib.contextmanager
def output_copied_to(path):
    """Whatever this process and its children write to stdout goes to a file too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(["tee", str(path)], stdin=subprocess.PIPE) as tee:
        stdout = os.dup(1)
        os.dup2(tee.stdin.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            tee.stdin.close()


def kernel_resources(log):
    """{(architecture, kernel): "registers N, shared N, spilled N"} from the output of ptxas -v."""
    found = {}
    entry = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'(?:.*\n)*?.*?(\d+) bytes spill stores"
        r".*\n.*Used (\d+) registers([^\n]*)"
    )
    for name, arch, spilled, registers, rest in entry.findall(log):
        static = re.search(r"(\d+) bytes smem", rest)
        shared = static[1] if static else 0
        text = f"registers {registers}, declared shared {shared} B, spilled {spilled} B"
        found[f"sm_{arch}", name] = text
    return found


def write_resources(log, target):
    """Adds this build's kernels to the file: one that had nothing to compile says nothing new."""
    lines = (
        dict(line.split("\t", 1) for line in target.read_text().splitlines())
        if target.exists()
        else {}
    )
    found = kernel_resources(log)
    names = sorted({name for _, name in found})
    if shutil.which("c++filt") and names:
        plain = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        ).stdout.splitlines()
    else:
        plain = names
    plain = dict(zip(names, plain, strict=True))
    for (arch, name), text in found.items():
        lines[f"{arch} {plain[name]}"] = text
    if lines:
        target.write_text("".join(f"{k}\t{v}\n" for k, v in sorted(lines.items())))


def check_compiler():
    """torch's own message for a missing compiler is of version 0.0.0."""
    for name in [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++"]:
        if not shutil.which(name.split()[0]):
            raise SystemExit(
                f"fastcls: no C++ compiler: {name} is not to be found. Install g++ or clang with "
                "C++20 (Debian and Ubuntu: apt install g++), or set CXX to the one to use"
            )


class Build(BuildExtension):
    def run(self):
        check_compiler()
        print(summary(), flush=True)
        log = Path(self.build_temp) / "output.log"
        with output_copied_to(log):
            super().run()
        if CUDA_HOME:
            package = ROOT if self.inplace else Path(self.build_lib)
            write_resources(log.read_text(), package / "fastcls" / "cuda_resources.txt")
        print(summary())


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
