"""What ``setup.py`` says where a tool is missing, and what a source distribution holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.mark.parametrize(
    "variables, message",
    [
        ({}, "fastcls: no C++ compiler: c++ is not to be found. Install g++ or clang"),
        ({"CXX": "my-compiler -m64"}, "fastcls: no C++ compiler: my-compiler -m64 is not"),
        ({"FASTCLS_CUDA": "yes"}, "FASTCLS_CUDA: expected auto, 0 or 1, got 'yes'"),
    ],
    ids=["none", "CXX", "FASTCLS_CUDA"],
)
def test_a_missing_tool_is_named(variables, message, tmp_path):
    for module in ("pybind11", "setuptools"):
        pytest.importorskip(module)
    (tmp_path / "empty").mkdir()
    environment = {n: v for n, v in os.environ.items() if n not in ("CXX", "CUDA_HOME")}
    child = subprocess.run(
        [sys.executable, str(SETUP), "build_ext", "--build-temp", str(tmp_path)],
        cwd=SETUP.parent,
        env=environment | {"PATH": str(tmp_path / "empty"), "FASTCLS_CUDA": "0"} | variables,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1].startswith(message)


def test_an_nvcc_that_knows_no_architecture_is_named(tmp_path):
    for module in ("pybind11", "setuptools"):
        pytest.importorskip(module)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    environment = {n: v for n, v in os.environ.items() if n != "TORCH_CUDA_ARCH_LIST"}
    child = subprocess.run(
        [sys.executable, str(SETUP), "build_ext", "--build-temp", str(tmp_path)],
        cwd=SETUP.parent,
        env=environment | {"CUDA_HOME": str(tmp_path), "FASTCLS_CUDA": "auto"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1].startswith(f"{nvcc} lists none of the architectures 7.5")


def test_a_source_distribution_holds_all_to_build_and_test(tmp_path):
    for module in ("pybind11", "setuptools"):
        pytest.importorskip(module)
    child = subprocess.run(
        [sys.executable, str(SETUP), "egg_info", "--egg-base", str(tmp_path)],
        cwd=SETUP.parent,
        env=os.environ | {"FASTCLS_CUDA": "0"},  # CUDA sources are packed all the same
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    packed = (tmp_path / "fastcls.egg-info" / "SOURCES.txt").read_text().splitlines()
    files = [file for folder in ("csrc", "tests") for file in (SETUP.parent / folder).rglob("*.*")]
    needed = [file for file in files if file.suffix in (".py", ".cpp", ".cu", ".h")]
    assert any(file.suffix == ".cu" for file in needed)
    assert not {file.relative_to(SETUP.parent).as_posix() for file in needed} - set(packed)
    assert {"CHANGELOG.md", "LICENSE", "Makefile", "bench/measure.py"} <= set(packed)
    assert not [name for name in packed if name.endswith((".so", ".pyc")) or "results" in name]
