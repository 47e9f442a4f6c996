"""Timing with the sides taking turns: whatever slows the machine down slows every side alike."""

import contextlib
import fcntl
import math
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 300
# Calls go on for as long as this between two looks at the clock, in seconds, or there are as many:
# the GPU's clock counts half microseconds, and a processor is slower right after other work.
BETWEEN_LOOKS, MOST_CALLS = 2e-4, 50


def alternate(benchmark, sides, seconds, threads):
    """Times all sides in one run, each in every round, in random order; short calls several times.

    pytest-benchmark runs the first side; the others take their turns in its set-up, so that each
    of its rounds is a round of everybody. One thread is timed by the processor time it gets, which
    leaves out what other processes take; more threads by the time that passes.

    Args:
        benchmark: a function that returns the fixture of pytest-benchmark; for the CPU alone.
        sides: {name: function without arguments}; ours comes first.
        seconds: time to spend on the rounds; very slow sides get ``MIN_ROUNDS`` all the same. With
            0 the sides run, and nothing is measured.
        threads: number of threads that the sides use.

    Returns:
        {name: [lower quartile, median, upper quartile]} in seconds, or None.
    """
    # One round's length, measured after compilation and the first touch of the memory.
    warm = {name: _warm_up(call) for name, call in sides.items()}
    if not seconds:
        return None
    calls = {n: min(MOST_CALLS, math.ceil(BETWEEN_LOOKS / warm[n])) for n in sides}
    rounds = _rounds(seconds, sum(warm[n] * calls[n] for n in sides))
    if on_cuda():
        return _alternate_on_cuda(sides, calls, rounds)
    first, *others = sides
    times = {name: [] for name in sides}
    clock = clock_of(threads)
    order = random.Random(0)

    def turn_of(name):
        times[name].append(seconds_of(sides[name], clock, calls[name]))

    def turns_of_others():
        order.shuffle(others)
        for name in others:
            turn_of(name)

    benchmark().pedantic(lambda: turn_of(first), setup=turns_of_others, rounds=rounds)
    return _quartiles(times)


def _alternate_on_cuda(sides, calls, rounds):
    """Without pytest-benchmark, whose clock is the wall's."""
    times = {name: [] for name in sides}
    turns, order = list(sides.items()), random.Random(0)
    for _ in range(rounds):
        order.shuffle(turns)
        for name, call in turns:
            times[name].append(gpu_seconds_of(call, calls[name]) / steps_of(call))
    return _quartiles(times)


def _rounds(seconds, one_round):
    return min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / one_round)))


def _quartiles(times):
    return {name: statistics.quantiles(values, n=4) for name, values in times.items()}


def on_cuda():
    """Do the benchmarks run on the GPU? Tensors are made on PyTorch's default device."""
    return torch.get_default_device().type == "cuda"


def clock_of(threads):
    return time.thread_time if threads == 1 else time.perf_counter


def seconds_of(call, clock=time.perf_counter, calls=1):
    """Of one of so many calls, by ``clock``; on the GPU by its own."""
    if on_cuda():
        return gpu_seconds_of(call, calls)
    start = clock()
    for _ in range(calls):
        call()
    return (clock() - start) / calls


def gpu_seconds_of(call, calls=1):
    """Of one of so many calls, between the events before and after them.

    Where the GPU waits for launches, that is what a call takes.
    """
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(calls):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / calls


class Replay:
    """Replays all of ``calls`` as one CUDA graph: each counts as in a larger graph, launch free."""

    def __init__(self, calls):
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # libraries choose their kernels before the capture
            for _ in range(3):
                calls[0]()
        torch.cuda.current_stream().wait_stream(side_stream)
        self.graph, self.steps = torch.cuda.CUDAGraph(), len(calls)
        with torch.cuda.graph(self.graph):
            self.results = [call() for call in calls]  # kept: replays write into them

    def __call__(self):
        self.graph.replay()


def steps_of(call):
    """How many of the steps to be timed a call takes."""
    return getattr(call, "steps", 1)


def _warm_up(call, calls=3):
    return min(seconds_of(call) for _ in range(calls))


def rotate(items):
    """Endless iterator over ``items``, so that a side meets its buffers cold."""
    while True:
        yield from items


# ---------------------------------------------------------------------------------------- dtypes


def torch_dtype(name):
    """Of a row's dtype: "tf32" is float32 whose products round their operands."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


@contextlib.contextmanager
def arithmetic(name):
    """On CUDA, products of float32 as the row's dtype says, of convolutions and of matrices.

    PyTorch's default is tf32 for convolutions and float32 for matrices.
    """
    # By the older of two interfaces: with the newer, what reads the older one raises.
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def autocast(dtype):
    """Half precision means float32 parameters under autocast, as in training."""
    if dtype in (torch.float32, torch.float64):
        return contextlib.nullcontext()
    return torch.autocast(torch.get_default_device().type, dtype)


# ------------------------------------------------------------------------------- taking the GPU


class Gpu:
    """The GPU among processes: all of them prepare their rows at once, one measures alone.

    So that `pytest -n 12` compiles twelve rows at a time, on a GPU that is silent while one is
    timed. Who wants it alone keeps the door shut until all others are out.
    """

    def __init__(self):
        folder = Path(tempfile.gettempdir())
        self.door, self.room = (
            (folder / f"fastcls-bench-{name}.lock").open("w") for name in ("door", "room")
        )

    def share(self):
        self.leave()
        fcntl.flock(self.door, fcntl.LOCK_EX)
        fcntl.flock(self.room, fcntl.LOCK_SH)
        fcntl.flock(self.door, fcntl.LOCK_UN)

    def take(self):
        self.leave()
        fcntl.flock(self.door, fcntl.LOCK_EX)
        fcntl.flock(self.room, fcntl.LOCK_EX)

    def leave(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        fcntl.flock(self.room, fcntl.LOCK_UN)
        fcntl.flock(self.door, fcntl.LOCK_UN)
