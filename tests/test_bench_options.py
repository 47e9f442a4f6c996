"""Options of the benchmarks that would leave everything out, or fail in the middle."""

from pathlib import Path

import pytest
from recipe_helpers import run_child

pytest.importorskip("pytest_benchmark")
BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--only", "digits10,tpyo"], "--only: tpyo not among "),
        (["--dtypes", "float33"], "--dtypes: float33 not among bfloat16, float32"),
        (["--batch", "512,0"], "--batch: every number must be at least 1"),
        (["--threads", "0"], "--threads: every number must be at least 1"),
    ],
)
def test_unfit_options_are_named(options, message):
    file = BENCH / "bench_cross_entropy.py"
    child = run_child("-m", "pytest", str(file), "--collect-only", *options)
    assert child.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {message}" in child.stderr
