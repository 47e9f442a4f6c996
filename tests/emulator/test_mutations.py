"""Faults put into the CUDA kernels on purpose: the op tests must see each of them.

Each is a compilation of its own, so this runs only when asked for:

    FASTCLS_MUTATIONS=1 pytest tests/emulator/test_mutations.py
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastcls

on_request = pytest.mark.skipif(
    "FASTCLS_MUTATIONS" not in os.environ, reason="takes minutes: set FASTCLS_MUTATIONS=1"
)

TESTS = Path(__file__).resolve().parents[1]
CSRC = TESTS.parent / "csrc"
CONV, LOSS = "tests/ops/conv_block", "tests/ops/cross_entropy"

# name: (file, its text, what becomes of it, test file, tests that are to fail)
MUTATIONS = {
    "barrier removed": (
        "conv_block_backward_weight.cu",
        "copy_async_wait<1>();\n    __syncthreads();",
        "copy_async_wait<1>();",
        CONV,
        "test_integers and emulated and deep3 and bfloat16-float32-contiguous",
    ),
    "edge of a tile off by one": (
        "conv_block_backward_weight.cu",
        "first + each < boxes ? first + each : boxes",
        "first + each < boxes ? first + each : boxes - 1",
        CONV,
        "test_integers and emulated and deep3 and bfloat16-float32-contiguous",
    ),
    "operands in different orders": (
        "conv_block_grads.h",
        "j = k / 8 * 2 + k % 2;",
        "j = k / 8 + k % 2 * 2;",
        CONV,
        "test_integers and emulated and deep3 and bfloat16-float32-contiguous",
    ),
    "bounds check missing": (
        "conv_block_grads.h",
        "return c < s.C ? tap * s.C + c : -1;",
        "return tap * s.C + c;",
        CONV,
        "test_integers and emulated and part-fragments and bfloat16-float32-contiguous",
    ),
    "accumulator not cleared": (
        "conv_block_gemm.h",
        "if (kFold || chunk == 0)",
        "if (first_stage)",
        CONV,
        "test_integers and emulated and mnist2 and bfloat16-float32-contiguous",
    ),
    "gradient at the wrong place of its window": (
        "conv_block_backward_input.cu",
        "only_winners(grads, places, place)",
        "only_winners(grads, places, place ^ 1)",
        CONV,
        "test_integers and emulated and mnist2 and bfloat16-float32-channels_last",
    ),
    "a warp with rows sits out": (
        "conv_block_gemm.h",
        "t.pooling == Pooling::kWindow ? 4 : 1);",
        "t.pooling == Pooling::kWindow ? 2 : 1);",
        CONV,
        "test_integers and emulated and mnist2 and bfloat16-float32-contiguous",
    ),
    "the last of equal maxima": (
        "conv_block_store.h",
        "v3 > v2 ? 3 : 2",
        "v3 >= v2 ? 3 : 2",
        CONV,
        "test_integers and emulated and mnist2 and bfloat16-float32-contiguous",
    ),
    "NaN taken for a number": (
        "conv_block_store.h",
        "exact |= best[i].value != best[i].value;",
        "",
        CONV,
        "test_nan_beats_infinity and emulated",
    ),
    "edge of the map taken for a whole window": (
        "conv_block_store.h",
        "bool exact = !whole;",
        "bool exact = false;",
        CONV,
        "test_pool_padding_never_wins and emulated",
    ),
    "operands not rounded to tf32": (
        "conv_block_patch.h",
        "for (float& e : rounded.e) e = Math::rounded(e);",
        "",
        CONV,
        "test_tf32_rounds and emulated",
    ),
    "infinity times a low part of zero": (
        "conv_block_patch.h",
        "fminf(fmaxf(float_of_bits(bits), -kLargest), kLargest)",
        "float_of_bits(bits)",
        CONV,
        "test_floats_beyond and cuda-emulated",
    ),
    "products of high parts alone": (
        "conv_block_patch.h",
        "mma_tf32(sums, high, low_part(b0), low_part(b1));",
        "",
        CONV,
        "test_error and cuda-emulated and float32 and deep3",
    ),
    "shuffle of the wrong width": (
        "cross_entropy_general.h",
        "__shfl_xor_sync(kFullWarp, value, lanes)",
        "__shfl_xor_sync(kFullWarp, value, lanes, 16)",
        LOSS,
        "emulated and test_cuda_kernels and prob",
    ),
    "what was summed not scaled to the new maximum": (
        "cross_entropy_softmax.h",
        "sum *= exp_of<T>(old - base());",
        "sum *= exp_of<T>(0 * (old - base()));",
        LOSS,
        "emulated and test_cuda_kernels_tails and float32",
    ),
    "end of a row taken for its beginning": (
        "cross_entropy_rows.h",
        "return i < head ? i : i + vectors * kPerVector<T>;",
        "return i;",
        LOSS,
        "emulated and test_cuda_kernels_tails and float32",
    ),
    "shared memory not by thread": (
        "cross_entropy_rows.h",
        "copy_async(stash + s * kBlockThreads,",
        "copy_async(stash + s,",
        LOSS,
        "emulated and test_cuda_kernels_of_long_rows and gradient",
    ),
    "values of warps read before they are there": (
        "cross_entropy_rows.h",
        "__syncthreads();\n    const float* of_lane",
        "const float* of_lane",
        LOSS,
        "emulated and test_cuda_kernels_with_several_turns",
    ),
    "second batch added up instead of the third": (
        "cross_entropy_rows.h",
        "ask_and_add(done + kStep, batch, kept)",
        "ask_and_add(done + kStep, batch, batch)",
        LOSS,
        "emulated and test_cuda_kernels_with_several_turns and rows",
    ),
    "values of warps overwritten where an ignored row lies between": (
        "cross_entropy_rows.h",
        "kExtras>(reduced++, ",
        "kExtras>(n / kGroups, ",
        LOSS,
        "emulated and test_cuda_kernels_with_several_turns and rows",
    ),
    "counter that does not return to 0": (
        "cross_entropy_common.h",
        "count_after_writing(out.counter, blocks - 1) ==",
        "count_after_writing(out.counter, blocks) ==",
        LOSS,
        "emulated and test_cuda_kernels_with_several_turns",
    ),
    "ignored rows scaled too": (
        "cross_entropy_rows.h",
        "if (problem.index(n) == problem.ignore_index) continue;",
        "",
        LOSS,
        "emulated and test_scale_in_place",
    ),
}


def run_tests(csrc, file, selected):
    return subprocess.run(
        [
            *[sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"],
            *[str(TESTS.parent / file), "-k", selected],
        ],
        env={
            **os.environ,
            "FASTCLS_EMULATED_CSRC": str(csrc),
            "PYTHONPATH": str(Path(fastcls.__file__).parents[1]),
        },
        cwd=TESTS,  # not the root, whose fastcls/ would hide the installed one
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_of_text_that_is_there(name):
    file, text, *_ = MUTATIONS[name]
    assert (CSRC / "cuda" / file).read_text().count(text) == 1, f"{file}: {text}"


@on_request
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name, tmp_path):
    file, text, replacement, tests, selected = MUTATIONS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / "cuda" / file
    source.write_text(source.read_text().replace(text, replacement))
    done = run_tests(csrc, tests, selected)
    output = done.stdout[-3000:] + done.stderr[-3000:]
    assert "build failed" not in output
    crashed = done.returncode < 0  # memory was overwritten
    assert crashed or (done.returncode == 1 and " failed" in done.stdout), output


@on_request
@pytest.mark.parametrize("tests, selected", sorted({m[3:] for m in MUTATIONS.values()}))
def test_without_a_mutation_they_pass(tests, selected):
    done = run_tests(CSRC, tests, selected)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
