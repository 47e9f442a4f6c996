"""Timing with the sides taking turns: whatever slows the machine down slows every side alike."""

import random
import statistics
import time

MIN_ROUNDS, MAX_ROUNDS = 7, 300


def alternate(benchmark, sides, seconds):
    """Times all sides in one run, one call of each per round, in random order.

    pytest-benchmark times the first side; the others take their turns in its set-up, so that each
    of its rounds is a round of everybody.

    Args:
        benchmark: the fixture of pytest-benchmark.
        sides: {name: function without arguments}; ours comes first.
        seconds: time to spend on the rounds; very slow sides get ``MIN_ROUNDS`` all the same.

    Returns:
        {name: [lower quartile, median, upper quartile]} in seconds.
    """
    (first, target), *others = sides.items()
    times = {name: [] for name in sides}
    order = random.Random(0)

    def turns_of_others():
        order.shuffle(others)
        for name, call in others:
            times[name].append(seconds_of(call))

    # One round's length, measured after compilation and the first touch of the memory.
    one_round = sum(_warm_up(call) for call in sides.values())
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / one_round)))
    benchmark.pedantic(target, setup=turns_of_others, rounds=rounds)
    times[first] = benchmark.stats.stats.data
    return {name: statistics.quantiles(values, n=4) for name, values in times.items()}


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _warm_up(call, calls=3):
    return min(seconds_of(call) for _ in range(calls))


def rotate(items):
    """Endless iterator over ``items``, so that a side meets its buffers cold."""
    while True:
        yield from items
