"""cross_entropy on every instruction set, at every tail length, with any number of threads."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cross_entropy_problems import DTYPES, IGNORED, SHAPES, class_weight, make_case, value_and_grad
from helpers import assert_digests_do_not_depend_on_memory, digest

from fastcls import build_info
from fastcls.functional import cross_entropy


def test_sums_do_not_depend_on_threads():
    input, target = make_case((5000, 10), "index", seed=3)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(value_and_grad(cross_entropy, input, target))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert loss == results[0][0] and (grad == results[0][1]).all()


# Every remainder of a vector of 8 or 16, by the tiles of few classes and by rows of many.
TAIL_CLASSES = [*range(1, 41), *range(97, 114), 515]
TAIL_ROWS = range(1, 21)


def tail_results(dtype):
    """{what: all numbers} of the CPU ops at every number of classes and rows."""
    ops = torch.ops.fastcls
    results = {"loss": [], "gradient": [], "gradient from rows": [], "hits": []}
    for (seed, C), rows in itertools.product(enumerate(TAIL_CLASSES), TAIL_ROWS):
        kind = ("index", "ignore", "prob")[(C + rows) % 3]
        input, target = make_case((rows, C), kind, dtype, seed=seed)
        weight = class_weight(C, dtype) if rows % 2 else None
        settings = (IGNORED, 0, 0.1 if rows % 4 < 2 else 0.0)
        loss, grad, hits = ops.cross_entropy_forward(
            input, target, weight, *settings, True, 2, kind != "prob"
        )
        _, saved, _ = ops.cross_entropy_forward(input, target, weight, *settings, True, 1, False)
        again = ops.cross_entropy_backward(
            torch.ones_like(loss), input, target, weight, saved, *settings
        )
        results["loss"].append(loss)
        results["gradient"].append(grad.flatten())
        results["gradient from rows"].append(again.flatten())
        if hits is not None:
            results["hits"].append(hits.view(1))
    return {what: torch.cat(values) for what, values in results.items()}


FAST_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def digests():
    """One line for each dtype and number: a hash of all tails' results."""
    for dtype in DTYPES:
        for what, values in tail_results(dtype).items():
            print(dtype, what, digest([values]))
    for shape, kind in itertools.product([s for s, _ in SHAPES], ("ignore", "prob")):
        input, target = make_case(shape, kind)
        print(shape, kind, digest(value_and_grad(cross_entropy, input, target)))


def test_no_result_depends_on_what_was_in_memory_before():
    assert_digests_do_not_depend_on_memory(Path(__file__))


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_tail_on_every_instruction_set(isa, tmp_path):
    """This process's kernels against those of another one, which uses another instruction set."""
    if build_info()["cpu_isa"] == isa:
        pytest.skip("in use")
    program = (
        "import sys, torch; from fastcls import _C; print(_C.isa()); "
        "import test_reproducibility as tests; "
        "torch.save([tests.tail_results(dtype) for dtype in tests.FAST_DTYPES], sys.argv[1])"
    )
    here = Path(__file__).parent  # not the root, whose fastcls/ would hide the installed one
    path = os.pathsep.join([str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "results.pt")],
        env={**os.environ, "FASTCLS_ISA": isa, "PYTHONPATH": path},
        cwd=here,
        capture_output=True,
        text=True,
    )
    if child.returncode and "does not support" in child.stderr:
        pytest.skip("this CPU lacks it")
    assert child.returncode == 0 and child.stdout.startswith(isa), child.stderr
    for dtype, theirs in zip(FAST_DTYPES, torch.load(tmp_path / "results.pt"), strict=True):
        ours, eps = tail_results(dtype), torch.finfo(dtype).eps
        assert ours.pop("hits").equal(theirs.pop("hits"))
        for what, expected in theirs.items():
            torch.testing.assert_close(
                ours[what], expected, rtol=8 * eps, atol=2 * eps,
                msg=lambda text, what=f"{what} {dtype}": f"{what}: {text}",
            )  # fmt: skip
