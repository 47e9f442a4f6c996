"""What this machine can do, measured: the arithmetic peak and the memory bandwidth.

The peak is that of a large matrix product or convolution, the best that a tuned library reaches on
the cores asked for; bandwidth is that of a copy far larger than the caches, counted as one read and
one write. `python bench/roofline.py` prints both.
"""

import datetime
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch
from measure import arithmetic, clock_of, on_cuda, seconds_of, torch_dtype

import fastcls

MATRIX, SMALL_MATRIX = 2048, 256
GPU_MATRIX = 8192
CONV_BATCH, CONV_CHANNELS, CONV_MAP = 8, 256, 30
COPY_BYTES, GPU_COPY_BYTES = 256 << 20, 1 << 30
REPEATS = 5


def _best(call):
    call()
    clock = clock_of(torch.get_num_threads())
    return min(seconds_of(call, clock) for _ in range(REPEATS))


def _matrix_product_rate(dtype, size):
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b)


def _convolution_rate(dtype):
    """Of PyTorch's other library: the matrix product of the first holds back on some processors."""
    image = torch.randn(CONV_BATCH, CONV_CHANNELS, CONV_MAP, CONV_MAP).to(dtype)
    weight = torch.randn(CONV_CHANNELS, CONV_CHANNELS, 3, 3).to(dtype)
    image, weight = (t.to(memory_format=torch.channels_last) for t in (image, weight))
    flops = 2 * CONV_BATCH * (CONV_MAP - 2) ** 2 * 9 * CONV_CHANNELS**2
    return flops / _best(lambda: torch.conv2d(image, weight))


@cache
def peak_flops(name, threads):
    """FLOP/s of the fastest matrix product or convolution in a row's dtype at this many threads.

    For half precision on a CPU that may be the float32 one: a machine without the instructions can
    always convert, so float32's peak is within its reach.
    """
    dtype = torch_dtype(name)

    def measured():
        if on_cuda():
            with arithmetic(name):
                return _matrix_product_rate(dtype, GPU_MATRIX)
        # Half precision without instructions for it can be a thousand times slower: try it small.
        fastest = max({torch.float32, dtype}, key=lambda d: _matrix_product_rate(d, SMALL_MATRIX))
        return max(_matrix_product_rate(fastest, MATRIX), _convolution_rate(fastest))

    return _at_threads(threads, measured)


@cache
def copy_bandwidth(threads):
    """Bytes/s, read plus written, of a large copy at this many threads."""

    def measured():
        size = GPU_COPY_BYTES if on_cuda() else COPY_BYTES
        source = torch.ones(size // 4)
        target = torch.empty_like(source)
        return 2 * size / _best(lambda: target.copy_(source))

    return _at_threads(threads, measured)


def _at_threads(threads, measured):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measured()
    finally:
        torch.set_num_threads(before)


def cpu_model():
    """The processor as the system tells it: clouds give several generations the same name."""
    cpuinfo = Path("/proc/cpuinfo")
    told = {}
    if cpuinfo.exists():
        first = cpuinfo.read_text().split("\n\n")[0]
        told = {k.strip(): v.strip() for k, _, v in (s.partition(":") for s in first.splitlines())}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    return "{model name} (family {cpu family}, model {model})".format_map(told)


def device_name():
    return torch.cuda.get_device_name() if on_cuda() else cpu_model()


def cores():
    """Cores of the processor, multiprocessors of the GPU."""
    if on_cuda():
        return torch.cuda.get_device_properties().multi_processor_count
    return os.cpu_count()


@cache
def driver():
    """Version of the GPU's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def circumstances(dtype, threads):
    """What a row of results says of the machine, the libraries and the day."""
    info = fastcls.build_info()
    # Rows of bfloat16 alone are the work of another instruction set.
    isa, torch_isa = info["cpu_isa"].removesuffix("_bf16"), torch.backends.cpu.get_cpu_capability()
    if on_cuda():
        isa, torch_isa = "CUDA", f"CUDA {torch.version.cuda}, driver {driver()}"
    return {
        "threads": threads,
        "peak_flops": peak_flops(dtype, threads),
        "copy_bytes": copy_bandwidth(threads),
        "cpu": device_name(),
        "cores": cores(),
        "isa": isa,
        "torch_isa": torch_isa,
        "torch": str(torch.__version__),
        "fastcls": info["fastcls"],
        "date": datetime.date.today().isoformat(),
    }


def main():
    print(f"{cpu_model()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for threads in sorted({1, torch.get_num_threads()}):
        peaks = ", ".join(
            f"{dtype} {peak_flops(dtype, threads) / 1e9:.0f} GFLOP/s"
            for dtype in ("float32", "bfloat16")
        )
        print(f"{threads} thread(s): {peaks}, copy {copy_bandwidth(threads) / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
