"""conv_block: forward, winners and gradients against PyTorch, on every case, dtype and layout."""

import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ConvCase
from conv_block_problems import (
    BY_NAME,
    CASES,
    DTYPES,
    backward,
    every_dtype,
    every_layout,
    forward_with_winner,
    given_winner_gradients,
    gradients,
    integer_answer,
    integer_problem,
    leaves_of,
    positional,
    random_problem,
)
from helpers import assert_error_within_twice_native, assert_same, with_layout

from fastcls import build_info, reference
from fastcls.functional import conv_block
from fastcls.ops import conv_block as op

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def decode(winner, case, conv_width):
    """(places in the flattened conv map as max_pool2d's indices, ReLU shut): both [N, K, h, w]."""
    *_, pool_size, pool_stride, pool_padding, _ = positional(case)
    (_, pool_w), (step_h, step_w) = pool_size or (1, 1), pool_stride or (1, 1)
    pad_h, pad_w = pool_padding or (0, 0)
    code = winner.permute(0, 3, 1, 2).long().cpu()
    row = torch.arange(code.shape[2])[:, None] * step_h - pad_h + code // pool_w
    column = torch.arange(code.shape[3]) * step_w - pad_w + code % pool_w
    return row * conv_width + column, code == torch.iinfo(winner.dtype).max


@every_layout
@every_dtype
@every_case
def test_integers_are_bit_for_bit_native(case, dtypes, layout, device):
    check_integers(case, dtypes, layout, device)


def check_integers(case, dtypes, layout, device):
    dtype, weight_dtype = dtypes
    x, w, b, grad_out = integer_problem(case, layout == "expanded")
    expected, indices, shut, conv_width, expected_grads = integer_answer(case, layout == "expanded")
    x, grad_out = x.to(device, dtype), grad_out.to(device, dtype)
    w, b = w.to(device, weight_dtype), b if b is None else b.to(device, weight_dtype)

    leaves = leaves_of(with_layout(x, layout), w, b)
    out = conv_block(*leaves, **case.function_arguments)
    assert_same(out.detach().cpu(), expected.to(dtype), "out")
    if layout != "expanded":  # that would be another gradient
        grad_out = with_layout(grad_out, layout)

    _, winner = forward_with_winner(*(t if t is None else t.detach() for t in leaves), case)
    if winner.numel():
        places, ours_shut = decode(winner, case, conv_width)
        assert torch.equal(ours_shut, shut)
        assert torch.equal(places[~shut], indices[~shut])
    else:
        assert case.activation is None and case.pool_size is None

    names = ["grad_input", "grad_weight", "grad_bias"]
    for name, ours, exact, leaf in zip(
        names, gradients(out, leaves, grad_out), expected_grads, leaves, strict=False
    ):
        assert_same(ours.cpu(), exact.to(leaf.dtype), name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@every_dtype
@every_case
def test_error_is_within_twice_native(case, dtypes, layout, device):
    check_error(case, random_problem(case, dtypes, device), layout)


def check_error(case, problem, layout, on_matrix_unit=False):
    x, w, b, grad_out = problem
    # On the CPU: cuDNN takes longer to find its float64 kernels than they run.
    in64 = [None if t is None else t.double().cpu() for t in (x, w, b, grad_out)]
    leaves = leaves_of(with_layout(x, layout), w, b)
    out = conv_block(*leaves, **case.function_arguments)
    assert out.dtype == x.dtype
    exact = reference.conv_block(*in64[:3], **case.function_arguments).to(x.device)
    native = native_outputs(x, w, b, case)
    out_ulps, *grad_ulps = matrix_unit_ulps(case) if on_matrix_unit else (2, 2, 2, 2)
    assert_error_within_twice_native(
        out.detach(), native, exact, "out", one_rounding=True, ulps=out_ulps
    )

    # The winners may differ from native's where two positions are as good as equal: the value
    # there must be as good as the maximum, and the gradients are those of the same winners.
    _, winner = forward_with_winner(*(t if t is None else t.detach() for t in leaves), case)
    picked, exact_grads = given_winner_gradients(*in64, winner.cpu(), case)
    exact_grads = [grad.to(x.device) for grad in exact_grads]
    assert_error_within_twice_native(
        picked.to(x), native, exact, "value at the winner", ulps=out_ulps
    )

    ours = gradients(out, leaves, with_layout(grad_out, layout))
    native_grads = native_gradients(x, w, b, grad_out, winner, case)
    names = ["grad_input", "grad_weight", "grad_bias"]
    if w.dtype != x.dtype and on_cuda(x):
        grad_ulps[1] = LEAST_MATRIX_UNIT_ULPS
    for name, ulps, leaf, *grads in zip(
        names, grad_ulps, leaves, ours, native_grads, exact_grads, strict=False
    ):
        assert grads[0].dtype == leaf.dtype
        assert_error_within_twice_native(*grads, name, one_rounding=True, ulps=ulps)


@pytest.mark.parametrize("channels, kernel", [(48, 3), (10, 5)])
def test_input_gradient_of_many_output_channels(channels, kernel):
    g = torch.Generator().manual_seed(2)
    x = torch.rand(2, channels, 7, 7, generator=g)
    w = torch.rand(2048, channels, kernel, kernel, generator=g)
    grad_out = torch.rand(2, 2048, 7, 7, generator=g)  # all of one sign: sums grow

    def grad_input(block, dtype, layout="contiguous"):
        leaf = with_layout(x.to(dtype), layout).requires_grad_()
        out = block(leaf, w.to(dtype), None, padding=kernel // 2, activation=None, pool_size=None)
        return torch.autograd.grad(out, leaf, grad_out.to(dtype))[0]

    exact = grad_input(reference.conv_block, torch.float64)
    natives = [
        grad_input(reference.conv_block, torch.float32, layout)
        for layout in ("contiguous", "channels_last")
    ]
    ours = grad_input(conv_block, torch.float32)
    assert_error_within_twice_native(ours, natives, exact, "grad_input")


# Float32 sums of the matrix units may be off by so much where native's, of other units, are better.
# Sums over overlapping windows they take as two bfloat16: 16 bits.
LEAST_MATRIX_UNIT_ULPS = 16


def matrix_unit_ulps(case):
    """For the output and the gradients of input, weight and bias.

    With each 8 products that the units add, they cut off what lies below the sum's last bit: half
    of it on average, and always towards zero, so that errors add up. The sum is then some third of
    the largest one, which is what errors are measured by: a sixth of an ulp for each step.
    """
    channels_out, channels_in, *kernel = case.weight_shape
    steps = [math.prod(kernel) * n / 8 for n in (channels_in, channels_out // case.groups)]
    longest = [max(LEAST_MATRIX_UNIT_ULPS, n / 6) for n in steps]
    return *longest, LEAST_MATRIX_UNIT_ULPS, LEAST_MATRIX_UNIT_ULPS


def on_cuda(x):
    return x.is_cuda or op._ops is not torch.ops.fastcls


def native_inputs(x, w, b):
    """In both memory formats, parameters in x's dtype: PyTorch has another kernel for each."""
    parameters = [None if t is None else t.to(x.dtype) for t in (w, b)]
    return [(with_layout(x, layout), *parameters) for layout in ("contiguous", "channels_last")]


def native_outputs(x, w, b, case):
    return [
        reference.conv_block(*tensors, **case.function_arguments)
        for tensors in native_inputs(x, w, b)
    ]


def native_gradients(x, w, b, grad_out, winner, case):
    """For each of x, w and b what PyTorch's kernels make of it, given the winners."""
    results = [
        given_winner_gradients(*tensors, grad_out, winner, case)[1]
        for tensors in native_inputs(x, w, b)
    ]
    if w.dtype != x.dtype:  # float32 parameters get gradients of float32 accuracy
        x, grad_out = x.float(), grad_out.float()
        in32 = [
            given_winner_gradients(*tensors, grad_out, winner, case)[1]
            for tensors in native_inputs(x, w, b)
        ]
        results = [(a[0], *b[1:]) for a, b in zip(results, in32, strict=True)]
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@every_case
def test_tf32_integers_are_bit_for_bit_native(case, layout, tf32_device):
    check_integers(case, DTYPES["float32"], layout, tf32_device)


def in_tf32(t):
    """`t` without the 13 bits of the mantissa that tf32 has not."""
    return t if t is None else (t.view(torch.int32) & -(1 << 13)).view(torch.float32)


def has_overlap(case):
    size, step = positional(case)[5:7]
    return any(a > b for a, b in zip(size, step, strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if not has_overlap(c)], ids=lambda c: c.name)
def test_tf32_error_is_within_twice_native_on_its_own_numbers(case, tf32_device):
    """With operands that tf32 holds, products are exact: it is as good as the adding.

    Gradients of overlapping windows are added up before they are rounded, so they are left out.
    """
    problem = [in_tf32(t) for t in random_problem(case, DTYPES["float32"], tf32_device)]
    check_error(case, problem, "channels_last", on_matrix_unit=True)


@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("sign", [1, -1])
def test_tf32_rounds_operands_to_nearest(sign, channels, tf32_device):
    ulp = 2.0**-10
    rounded = {1 + 0.75 * ulp: 1 + ulp, 1 + 0.25 * ulp: 1.0}
    for value, nearest in rounded.items():
        x = torch.full((1, channels, 8, 8), sign * value, device=tf32_device)
        w = torch.ones(16, channels, 1, 1, device=tf32_device)
        arguments = {"activation": None, "pool_size": None}
        for a, b in ((x, w), (torch.ones_like(x), w * sign * value)):
            out = conv_block(*leaves_of(a, b), None, **arguments)
            assert (out == sign * nearest * channels).all()
        leaves = leaves_of(x, w)
        out = conv_block(*leaves, None, **arguments)
        grad_x, grad_w = gradients(out, leaves, torch.full_like(out, value))
        assert (grad_x == nearest * 16).all()
        assert (grad_w == sign * nearest * nearest * 64).all()


@every_layout
@pytest.mark.parametrize("which", ["weight", "grad_out"])
@pytest.mark.parametrize("name", ["plain", "tails", "rect", "depthwise", "deep3", "cifar1"])
def test_any_layout_of_weight_and_grad_out(name, which, layout, device):
    case = BY_NAME[name]
    x, w, b, grad_out = (t.float().to(device) for t in integer_problem(case))
    if which == "weight":
        w = with_layout(w, layout)
        b = torch.stack([b, b * torch.nan], dim=1)[:, 0]  # every second float
    else:
        grad_out = with_layout(grad_out, layout)
    in64 = leaves_of(*(t.cpu().double() for t in (x, w, b)))
    leaves = leaves_of(x, w, b)
    expected = reference.conv_block(*in64, **case.function_arguments)
    expected_grads = gradients(expected, in64, grad_out.cpu().double())
    out = conv_block(*leaves, **case.function_arguments)
    assert_same(out.detach().cpu(), expected.detach().float(), "out")
    for ours, exact in zip(gradients(out, leaves, grad_out), expected_grads, strict=True):
        assert_same(ours.cpu(), exact.float(), "gradient")


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=3) if any(n)])
@pytest.mark.parametrize("name", ["plain", "overlap", "conv-only", "cifar2", "mnist1-pool"])
def test_every_subset_of_gradients(name, needs, device):
    case = BY_NAME[name]
    x, w, b, grad_out = (t.float().to(device) for t in integer_problem(case))
    *_, expected = integer_answer(case)
    leaves = [t.clone().requires_grad_(need) for t, need in zip((x, w, b), needs, strict=True)]
    conv_block(*leaves, **case.function_arguments).backward(grad_out)
    _, winner = forward_with_winner(x, w, b, case)
    from_op = backward(grad_out, x, w, winner, case, needs)
    for leaf, need, exact, direct in zip(leaves, needs, expected, from_op, strict=True):
        if need:
            assert_same(leaf.grad.cpu(), exact.float(), "gradient")
            assert_same(direct.cpu(), exact.float(), "gradient of the op")
        else:
            assert leaf.grad is None and direct.numel() == 0


LENGTHS = {  # what has the length, from the kernels' point of view
    "in_channels": lambda n: ConvCase("", "", n, 9, 6, 6, padding=1),
    "out_channels": lambda n: ConvCase("", "", 5, n, 6, 6, padding=1),
    "winograd_out_channels": lambda n: ConvCase("", "", 16, n, 6, 6, padding=1),
    "columns": lambda n: ConvCase("", "", 9, 9, 4, n, padding=1, pool_size=None),
    "winograd_columns": lambda n: ConvCase("", "", 16, 16, 4, n, padding=1, pool_size=None),
    "winograd_rows": lambda n: ConvCase("", "", 16, 16, n, 5, padding=1, pool_size=None),
    "deep_columns": lambda n: ConvCase(
        "", "", 3, 20, 5, n, kernel=(2, 3), padding=1, pool_size=None
    ),
    "windows": lambda n: ConvCase("", "", 16, 16, 4, 2 * n, padding=1),
    "images": lambda n: ConvCase("", "", 9, 9, 5, 5, batch=n),
    "taps": lambda n: ConvCase("", "", 2, 9, 5, n + 2, kernel=(2, n)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("what", LENGTHS)
def test_every_tail_length_is_the_scalar_kernel(what, layout, device):
    """Any number of anything, against the scalar kernels, which serve float64: bit for bit."""
    for n in range(1, 40):
        case = LENGTHS[what](n)
        problem = [with_layout(t, layout) if t.dim() == 4 else t for t in integer_problem(case)]
        results = []
        for dtype in (torch.float32, torch.float64):
            x, w, b, grad_out = (t.to(device, dtype) for t in problem)
            out, winner = forward_with_winner(x, w, b, case)
            results.append((out, winner, *backward(grad_out, x, w, winner, case)))
        names = ["out", "winner", "grad_input", "grad_weight", "grad_bias"]
        for name, ours, exact in zip(names, *results, strict=True):
            assert torch.equal(ours.double(), exact.double()), (name, n)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    """The integer tests again, in a process that uses another instruction set."""
    if build_info()["cpu_isa"] == isa:
        pytest.skip("in use")
    run = functools.partial(
        subprocess.run,
        env={**os.environ, "FASTCLS_ISA": isa},
        cwd=Path(__file__).parent,  # not the root, whose fastcls/ would hide the installed one
        capture_output=True,
        text=True,
    )
    probe = run([sys.executable, "-c", "from fastcls import _C; print(_C.isa())"])
    if probe.returncode:
        assert isa in probe.stderr
        pytest.skip("this CPU lacks it")
    assert probe.stdout.strip() == isa
    layouts = "(float32-contiguous or bfloat16-contiguous)"
    chosen = (
        f"cpu and (test_integers_are_bit_for_bit_native and {layouts} or test_every_tail_length)"
    )
    program = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        chosen,
    ]
    tests = run(program)
    assert tests.returncode == 0, tests.stdout[-3000:]
