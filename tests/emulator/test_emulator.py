"""The emulator runs warp functions as a device does, and reports the faults it claims to see."""

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator import build

HERE = Path(__file__).parent
SOURCES = [HERE / "emulator.cpp", HERE / "probes.cpp"]


def call(name, *arguments):
    """Runs a probe; returns what the emulator reported, "" for nothing."""
    library = ctypes.CDLL(str(build.build("probes", SOURCES, build.torch_flags())))
    message = ctypes.create_string_buffer(1000)
    getattr(library, f"probe_{name}")(message, *arguments)
    return message.value.decode()


def ints(values):
    return (ctypes.c_int * len(values))(*values)


def floats(values):
    return (ctypes.c_float * len(values))(*values)


def test_warp_sums():
    sums = floats([0, 0])
    assert call("sum_warps", floats(range(64)), sums) == ""
    assert list(sums) == [sum(range(32)), sum(range(32, 64))]


@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffles(width):
    x, out = ints([100 + lane for lane in range(32)]), ints([0] * 32)
    assert call("shuffle", 5, width, x, out) == ""
    # The device's rule: a lane may read from a lower group, not from a higher one.
    xor = [lane ^ 5 if (lane ^ 5) // width <= lane // width else lane for lane in range(32)]
    assert [v - 100 for v in out] == xor


@pytest.mark.parametrize("step", [1, 63])
def test_shared_memory_with_and_without_its_barrier(step):
    x, out = floats(range(64)), floats([0] * 64)
    expected = [(i + step) % 64 for i in range(64)]
    assert call("rotate", step, 1, x, out) == ""
    assert list(out) == expected
    # Whichever neighbour is read, one of the two orders in which threads run shows the fault: it
    # reads what nobody has written yet, which is NaN.
    stale = 0
    for _ in range(2):
        call("rotate", step, 0, x, out)
        stale += sum(math.isnan(v) for v in out)
    assert stale >= 60


def test_a_barrier_that_some_threads_miss_is_reported():
    assert call("barrier_for", 64) == ""
    report = call("barrier_for", 33)
    assert "threads wait for ever (block 0, 0, 0)" in report
    assert "31 of 64 threads have returned, __syncthreads reached by 33" in report
    assert call("barrier_for", 64) == ""  # the emulator is whole again


def test_a_shuffle_that_some_lanes_miss_is_reported():
    assert call("shuffle_for", 64) == ""
    assert "warp function reached by 8 lanes of warp 1" in call("shuffle_for", 40)


def test_launches_that_no_device_takes_are_reported():
    assert call("launch", 65535, 32) == ""
    assert "invalid grid" in call("launch", 65536, 32)
    assert "invalid grid" in call("launch", 0, 32)
    assert "invalid block of 1025 threads" in call("launch", 1, 1025)
    assert "65536 bytes of shared memory" in call("take_shared")


def random_matrix(dtype, *shape):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize(
    "mode, dtype", [(0, torch.bfloat16), (1, torch.float16), (2, torch.float32)], ids=str
)
def test_fragments_multiply_as_matrices_do(mode, dtype):
    depth = 48 if dtype != torch.float32 else 24
    a, b = random_matrix(dtype, 16, depth), random_matrix(dtype, 8, depth)
    d = torch.empty(16, 8)
    row_bytes = depth * dtype.itemsize
    assert call("multiply", mode, row_bytes, pointer(a), pointer(b), pointer(d)) == ""
    assert torch.equal(d, a.float() @ b.float().T)


def test_transposed_fragments_multiply_as_matrices_do():
    a, b = random_matrix(torch.float16, 16, 16), random_matrix(torch.float16, 16, 8)
    d = torch.empty(16, 8)
    assert call("multiply_transposed", pointer(a), pointer(b), pointer(d)) == ""
    assert torch.equal(d, a.float().T @ b.float())


def test_tf32_products_drop_the_last_bits():
    a, b, d = torch.full((16, 8), 1 + 2.0**-11), torch.ones(8, 8), torch.empty(16, 8)
    assert call("multiply", 2, 32, pointer(a), pointer(b), pointer(d)) == ""
    assert (d == 8).all()


def test_asynchronous_copies():
    aligned = torch.arange(64, dtype=torch.uint8)
    assert aligned.data_ptr() % 16 == 0
    out = torch.empty(32, dtype=torch.uint8)
    assert call("copy", 16, 1, pointer(aligned), pointer(out)) == ""
    assert torch.equal(out, torch.cat([aligned[16:32], torch.zeros(16, dtype=torch.uint8)]))
    # Unless it is waited for, nothing has arrived, and that is reported too.
    assert "returned before its asynchronous copies" in call(
        "copy", 16, 0, pointer(aligned), pointer(out)
    )
    assert (out == 255).all()
    report = call("copy", 8, 1, pointer(aligned), pointer(out))
    assert "asynchronous copy from an address that is not aligned to 16" in report


def test_more_shared_memory_than_a_device_gives_is_reported():
    assert call("ask_shared", 99 << 10) == ""
    assert "launch with 101377 bytes of shared memory" in call("ask_shared", (99 << 10) + 1)


@pytest.mark.parametrize("probe", ["write_at", "write_shared_at"])
@pytest.mark.parametrize("index", [7, 8])
def test_a_write_past_the_end_is_caught_by_address_sanitizer(probe, index):
    program = f"""if True:
        import ctypes, sys
        sys.path.insert(0, {str(HERE.parent)!r})
        from emulator.test_emulator import call
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        out = [ctypes.c_void_p(libc.malloc(32))] if {probe!r} == "write_at" else []
        print(call({probe!r}, {index}, *out))
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=build.sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    if index < 8:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
        assert probe in done.stderr
