"""conv_block gives the same bits, whatever else the machine does."""

from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from cases import ConvCase
from conv_block_problems import BY_NAME, CASES, DTYPES, gradients, leaves_of, random_problem, run
from helpers import assert_digests_do_not_depend_on_memory, assert_same, digest, with_layout

from fastcls.functional import conv_block


def digests():
    """One line for each case: its name, layout and a hash of the block's output and gradients."""
    for case in CASES:
        for layout in ("contiguous", "channels_last"):
            x, w, b, grad_out = random_problem(case, DTYPES["float32"], "cpu")
            # Weights so large that a product with what memory was filled with is infinite.
            leaves = leaves_of(with_layout(x, layout), 1000 * w, b)
            out = conv_block(*leaves, **case.function_arguments)
            results = [out.detach(), *gradients(out, leaves, with_layout(grad_out, layout))]
            print(case.name, layout, digest(results))


def test_no_result_depends_on_what_was_in_memory_before():
    assert_digests_do_not_depend_on_memory(Path(__file__))


REPEATED = ["plain", "tails", "overlap", "cifar1", "cifar2", "deep3", "lenet2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16-float32", "float16"])
@pytest.mark.parametrize("name", REPEATED)
def test_same_bits_every_time(name, dtype, device):
    first, second = (run(BY_NAME[name], DTYPES[dtype], device) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same(a, b, "second run")


# With so many products to an image that threads share out its channels, which fill no vector.
SHARED = [
    ConvCase("shares", "any window", 16, 75, 14, 13, pool_size=3, pool_stride=1),
    ConvCase("shares-bands", "bands of rows", 16, 83, 22, 224, padding=1, pool_size=3),
    ConvCase("winograd-shares", "Winograd", 32, 150, 10, 9, padding=1),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16-float32"])
@pytest.mark.parametrize("case", [*map(BY_NAME.get, REPEATED), *SHARED], ids=attrgetter("name"))
def test_same_bits_with_any_number_of_threads(case, dtype, batch, layout):
    x, w, b, grad_out = random_problem(replace(case, batch=batch), DTYPES[dtype], "cpu")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7, 16):
            torch.set_num_threads(count)
            leaves = leaves_of(with_layout(x, layout), w, b)
            out = conv_block(*leaves, **case.function_arguments)
            results.append([out.detach(), *gradients(out, leaves, with_layout(grad_out, layout))])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_same(a, b, "other number of threads")


@pytest.mark.parametrize("name", ["plain", "tails", "cifar2"])
def test_an_image_does_not_depend_on_its_batch(name, device):
    x, w, b, _ = random_problem(replace(BY_NAME[name], batch=5), DTYPES["float32"], device)
    arguments = BY_NAME[name].function_arguments
    whole = conv_block(x, w, b, **arguments)
    for n in (0, 4):
        assert_same(conv_block(x[n : n + 1], w, b, **arguments), whole[n : n + 1], f"image {n}")
