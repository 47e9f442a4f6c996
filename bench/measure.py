"""Timing with the sides taking turns: whatever slows the machine down slows every side alike."""

import random
import statistics
import time

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 300


def alternate(benchmark, sides, seconds, threads):
    """Times all sides in one run, one call of each per round, in random order.

    pytest-benchmark runs the first side; the others take their turns in its set-up, so that each
    of its rounds is a round of everybody. One thread is timed by the processor time it gets, which
    leaves out what other processes take; more threads by the time that passes.

    Args:
        benchmark: the fixture of pytest-benchmark.
        sides: {name: function without arguments}; ours comes first.
        seconds: time to spend on the rounds; very slow sides get ``MIN_ROUNDS`` all the same.
        threads: number of threads that the sides use.

    Returns:
        {name: [lower quartile, median, upper quartile]} in seconds.
    """
    (first, target), *others = sides.items()
    times = {name: [] for name in sides}
    clock = clock_of(threads)
    order = random.Random(0)

    def turns_of_others():
        order.shuffle(others)
        for name, call in others:
            times[name].append(seconds_of(call, clock))

    # One round's length, measured after compilation and the first touch of the memory.
    one_round = sum(_warm_up(call) for call in sides.values())
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / one_round)))
    if on_cuda():  # pytest-benchmark's clock is the wall's
        sides_in_turn = list(sides.items())
        for _ in range(rounds):
            order.shuffle(sides_in_turn)
            for name, call in sides_in_turn:
                times[name].append(seconds_of(call, clock))
    else:
        benchmark.pedantic(
            lambda: times[first].append(seconds_of(target, clock)),
            setup=turns_of_others,
            rounds=rounds,
        )
    return {name: statistics.quantiles(values, n=4) for name, values in times.items()}


def on_cuda():
    """Do the benchmarks run on the GPU? Tensors are made on PyTorch's default device."""
    return torch.get_default_device().type == "cuda"


def clock_of(threads):
    return time.thread_time if threads == 1 else time.perf_counter


def seconds_of(call, clock=time.perf_counter):
    """By ``clock``; on the GPU by its own, between the events before and after the call."""
    if on_cuda():
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3
    start = clock()
    call()
    return clock() - start


def graphed(calls):
    """One function that replays CUDA graphs of the calls in turns."""
    graphs = []
    for call in calls:
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):  # libraries choose their kernels before the capture
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            graph.results = call()  # kept: replays write into them
        graphs.append(graph)
    turns = rotate(graphs)
    return lambda: next(turns).replay()


def _warm_up(call, calls=3):
    return min(seconds_of(call) for _ in range(calls))


def rotate(items):
    """Endless iterator over ``items``, so that a side meets its buffers cold."""
    while True:
        yield from items
