"""conv_block: forward, winners and gradients against PyTorch, on every case, dtype and layout."""

import functools
import itertools
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CORNERS, REFERENCE, ConvCase
from emulator import build as emulator
from helpers import (
    LAYOUTS,
    assert_digests_do_not_depend_on_memory,
    assert_error_within_twice_native,
    assert_same,
    digest,
    is_channels_last,
    with_layout,
)

from fastcls import build_info, functional, reference
from fastcls._arguments import conv_block_arguments
from fastcls.functional import conv_block

# The reference nets' layers, with maps and batches that the general kernel does in milliseconds.
SIZES = {"vgg2": {"height": 18, "width": 18}, "alexnet1": {"height": 63, "width": 63}}
CASES = CORNERS + [replace(c, batch=2, **SIZES.get(c.name, {})) for c in REFERENCE]
BY_NAME = {c.name: c for c in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)

# dtype of the input and of the parameters.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float16-float32": (torch.float16, torch.float32),
}
every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=["cpu", "cuda-emulated", "cuda-7.5-emulated", "cuda"])
def device(request, monkeypatch):
    """Where the tensors are; emulated, CUDA kernels run on tensors of the CPU."""
    return use_device(request.param, monkeypatch, getattr(request.node, "callspec", None))


@pytest.fixture(params=["cuda-emulated", "cuda"])
def tf32_device(request, monkeypatch):
    """Where float32 products may round their operands to tf32."""
    device = use_device(request.param, monkeypatch)
    monkeypatch.setattr(functional, "_allow_tf32", lambda x: x.dtype == torch.float32)
    return device


def use_device(name, monkeypatch, callspec=None):
    if name != "cpu" and callspec and not worth_running(**callspec.params):
        pytest.skip("CUDA: every layout with two dtypes, every dtype with two layouts")
    if name == "cuda-7.5-emulated":
        given = {"dtypes": DTYPES["float32"], "layout": "channels_last"} | callspec.params
        if given["dtypes"] != DTYPES["float32"] or given["layout"] != "channels_last":
            pytest.skip("of its own it has multiply-adds of float32: one layout shows them")
        monkeypatch.setenv("FASTCLS_EMULATED_ARCH", "75")
    if name.endswith("emulated"):
        monkeypatch.setattr(functional, "_ops", emulator.load())
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        # Through the older of two interfaces: with the newer, what reads the older one raises.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(name)


def worth_running(layout=None, dtypes=None, **_):
    many_layouts = (DTYPES["float32"], DTYPES["bfloat16-float32"])
    return layout in (None, "contiguous", "channels_last") or dtypes in (None, *many_layouts)


# Tracing asks for the ops' fakes, which the emulated ones lack.
not_emulated = pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)


def positional(case):
    return conv_block_arguments(**case.function_arguments)


def forward_with_winner(x, w, b, case):
    """The op itself, as autograd calls it."""
    return functional._ops.conv_block_forward(
        x, w, b, *positional(case), True, functional._allow_tf32(x)
    )


def backward(grad_out, x, w, winner, case, needs=(True, True, True)):
    tf32 = functional._allow_tf32(x)
    return functional._ops.conv_block_backward(
        grad_out, x, w, winner, *positional(case), *needs, tf32
    )


def decode(winner, case, conv_width):
    """(places in the flattened conv map as max_pool2d's indices, ReLU shut): both [N, K, h, w]."""
    *_, pool_size, pool_stride, pool_padding, _ = positional(case)
    (_, pool_w), (step_h, step_w) = pool_size or (1, 1), pool_stride or (1, 1)
    pad_h, pad_w = pool_padding or (0, 0)
    code = winner.permute(0, 3, 1, 2).long().cpu()
    row = torch.arange(code.shape[2])[:, None] * step_h - pad_h + code // pool_w
    column = torch.arange(code.shape[3]) * step_w - pad_w + code % pool_w
    return row * conv_width + column, code == torch.iinfo(winner.dtype).max


def integers(generator, least, greatest, shape):
    return torch.randint(least, greatest + 1, shape, generator=generator).double()


@functools.cache
def integer_problem(case, expanded=False):
    """Small integers, so that all sums are exact in every dtype: float64 (x, w, b, grad_out)."""
    g = torch.Generator().manual_seed(1)
    x = integers(g, -2, 2, (case.batch, case.in_channels, case.height, case.width))
    if expanded:
        x = with_layout(x, "expanded").contiguous()
    w = integers(g, -1, 1, case.weight_shape)
    b = integers(g, -2, 2, (case.out_channels,)) if case.bias else None
    out = reference.conv_block(x, w, b, **case.function_arguments)
    assert out.abs().max() <= 256, "not exact in bfloat16"
    return x, w, b, integers(g, -2, 2, out.shape)


@functools.cache
def integer_answer(case, expanded=False):
    """What native PyTorch makes of it in float64: out, indices (or None), shut, gradients."""
    x, w, b, grad_out = integer_problem(case, expanded)
    leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    out = reference.conv_block(*leaves, *([] if case.bias else [None]), **case.function_arguments)
    conv = F.conv2d(x, w, b, case.stride, case.padding, case.dilation, case.groups)
    best, indices = conv, torch.arange(conv[0, 0].numel()).view(conv.shape[2:]).expand_as(conv)
    if case.pool_size is not None:
        pooling = (case.pool_size, case.pool_stride, case.pool_padding, 1, case.ceil_mode)
        best, indices = F.max_pool2d(conv, *pooling, return_indices=True)
    shut = best <= 0 if case.activation else torch.zeros_like(best, dtype=torch.bool)
    grads = torch.autograd.grad(out, leaves, grad_out)
    return out.detach(), indices, shut, conv.shape[3], grads


def random_problem(case, dtypes, device):
    """Normally distributed (x, w, b, grad_out); conv outputs of about unit size."""
    g = torch.Generator().manual_seed(2)
    dtype, weight_dtype = dtypes
    x = torch.randn(case.batch, case.in_channels, case.height, case.width, generator=g)
    w = torch.randn(case.weight_shape, generator=g)
    w /= w[0].numel() ** 0.5
    b = torch.randn(case.out_channels, generator=g) / 2 if case.bias else None
    shape = reference.conv_block(x, w, b, **case.function_arguments).shape
    grad_out = torch.randn(shape, generator=g)
    b = b if b is None else b.to(device, weight_dtype)
    return x.to(device, dtype), w.to(device, weight_dtype), b, grad_out.to(device, dtype)


def leaves_of(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(out, leaves, grad_out):
    return torch.autograd.grad(out, [t for t in leaves if t is not None], grad_out)


def given_winner_gradients(x, w, b, grad_out, winner, case):
    leaves = leaves_of(x, w, b)
    out = reference.conv_block_given_winner(*leaves, winner, positional(case))
    return out.detach(), gradients(out, leaves, grad_out)


# ---------------------------------------------------------------------- against native PyTorch


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
    return x.is_cuda or functional._ops is not torch.ops.fastcls


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


PATHS = {
    "deep2": "winograd",
    "wide2": "winograd",
    "winograd-map": "winograd",
    "mnist1": "direct",
    "cifar1": "direct",
    "overlap": "direct",
    "strided": "direct",
    "groups": "general",
    "wide-window": "general",
}


@pytest.mark.parametrize("name", PATHS)
def test_path_can_be_asked(name):
    case = BY_NAME[name]
    x, w = torch.zeros(1, case.in_channels, case.height, case.width), torch.zeros(case.weight_shape)
    fast = build_info()["cpu_isa"] != "scalar"
    path = functional.conv_block_path(x, w, **case.function_arguments)
    assert path == (PATHS[name] if fast else "general")
    double = functional.conv_block_path(x.double(), w.double(), **case.function_arguments)
    assert double == "general"
    if build_info()["cpu_isa"] == "avx512_bf16":  # pairs go without Winograd's algorithm
        pairs = functional.conv_block_path(x.bfloat16(), w, **case.function_arguments)
        assert pairs == path.replace("winograd", "direct")
        with torch.autocast("cpu", torch.bfloat16):
            assert functional.conv_block_path(x, w, **case.function_arguments) == pairs


def test_path_of_what_is_no_call_is_an_error():
    x, w = torch.zeros(1, 3, 5, 5), torch.zeros(4, 3, 3, 3)
    with pytest.raises(TypeError, match="conv_block_path: input must be a Tensor, got list"):
        functional.conv_block_path([1.0], w)
    with pytest.raises(TypeError, match=r"conv_block_path: unexpected arguments \['size'\]"):
        functional.conv_block_path(x, w, size=3)
    with pytest.raises(RuntimeError, match="input must have 3 channels"):
        functional.conv_block_path(x[:, :2], w)


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


CUDA_PATHS = {
    "deep2": "gemm",
    "wide2": "gemm",
    "vgg2": "gemm",
    "mnist1": "direct",
    "cifar1": "direct",
    "alexnet1": "direct",
    "overlap": "direct",
    "odd-map": "gemm",
    "groups": "general",
    "wide-window": "general",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CUDA_PATHS)
def test_path_can_be_asked_on_cuda(name, dtype, tf32_device):
    case = BY_NAME[name]
    x = torch.zeros(1, case.in_channels, case.height, case.width, device=tf32_device)
    w = torch.zeros(case.weight_shape, device=tf32_device)
    for tensors in ((x.to(dtype), w.to(dtype)), (x.to(dtype), w)):
        path = functional.conv_block_path(*tensors, **case.function_arguments)
        assert path == CUDA_PATHS[name]
    double = functional.conv_block_path(x.double(), w.double(), **case.function_arguments)
    assert double == "general"


def test_more_output_channels_than_a_cuda_grid_has_blocks_for(tf32_device):
    x = torch.zeros(1, 16, 1, 1, device=tf32_device)
    few, many = (
        torch.zeros(1, 16, 1, 1, device=tf32_device).expand(n, -1, -1, -1)
        for n in (1 << 20, 1 << 23)
    )
    assert functional.conv_block_path(x, few, pool_size=None) == "gemm"
    assert functional.conv_block_path(x, many, pool_size=None) == "general"


def test_no_grad_gives_the_same_output_and_no_graph(device):
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float32"], device)
    leaves = leaves_of(x, w, b)
    expected = conv_block(*leaves)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = conv_block(*leaves)
        assert not out.requires_grad
        assert_same(out, expected.detach(), mode.__name__)


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
    chosen = f"(test_integers_are_bit_for_bit_native and cpu and {layouts})"
    chosen += " or test_every_tail_length"
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


# ---------------------------------------------------------------------------------- semantics


def pointwise(values, device, **arguments):
    """conv_block with a 1 x 1 identity convolution over one map of `values`: (out, dX of a sum)."""
    x = torch.tensor(values, dtype=torch.float32, device=device)[None, None].requires_grad_()
    out = conv_block(x, torch.ones(1, 1, 1, 1, device=device), None, **arguments)
    (grad,) = torch.autograd.grad(out.sum(), x)
    return out.detach()[0, 0].tolist(), grad[0, 0].tolist()


@pytest.mark.parametrize("activation", ["relu", None])
def test_first_of_equal_maxima_gets_the_gradient(activation, device):
    out, grad = pointwise([[1, 3, 2, 2], [3, 3, 2, 2]], device, activation=activation)
    assert out == [[3, 2]]
    assert grad == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_first_of_equal_maxima_inside_the_padding(device):
    case = BY_NAME["pool-padded"]
    x = torch.ones(1, 4, 12, 12, device=device).requires_grad_()
    w = torch.zeros(8, 4, 3, 3, device=device)
    w[:, :, 1, 1] = 1
    out = conv_block(x, w, None, **case.function_arguments)
    native = reference.conv_block(x, w, None, **case.function_arguments)
    assert_same(out.detach(), native.detach(), "out")
    assert_same(*(torch.autograd.grad(o.sum(), x)[0] for o in (out, native)), "grad_input")


def test_relu_has_no_gradient_at_zero(device):
    assert pointwise([[0, 0], [0, -1]], device) == ([[0]], [[0, 0], [0, 0]])
    assert pointwise([[0, 0], [0, -1]], device, activation=None) == ([[0]], [[1, 0], [0, 0]])
    x, w, b = leaves_of(*(torch.zeros(s, device=device) for s in ((2, 8, 6, 6), (16, 8, 3, 3), 16)))
    for grad in torch.autograd.grad(conv_block(x, w, b).sum(), (x, w, b)):
        assert not grad.any()


def test_a_shut_window_gives_positive_zero(device):
    out, grad = pointwise([[-1, -2], [-3, -0.0]], device)
    assert out == [[0]] and str(out[0][0]) == "0.0"
    assert grad == [[0, 0], [0, 0]]


def test_minus_infinity_wins_only_among_its_like(device):
    inf = float("inf")
    out, grad = pointwise([[-inf, -inf, -inf, -7]] * 2, device, activation=None)
    assert out == [[-inf, -7]]
    assert grad == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert pointwise([[-inf, -inf], [-inf, -inf]], device) == ([[0]], [[0, 0], [0, 0]])


def test_pool_padding_never_wins(device):
    out, grad = pointwise([[-1, -2], [-3, -4]], device, activation=None, pool_padding=1)
    assert out == [[-1, -2], [-3, -4]]
    assert grad == [[1, 1], [1, 1]]


@pytest.mark.parametrize("channels", [1, 3, 16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, torch.finfo(torch.float32).max])
def test_floats_beyond_every_tf32(value, channels, device):
    """Products with any weight are what they are: of infinity, and of the largest float."""
    for weight in [1.0, 0.3, -0.1, 1e-30, *([] if math.isfinite(value) else [3000.7, -70000.3])]:
        product = (torch.tensor(weight) * value).view(1)
        w = torch.zeros(16, channels, 1, 1, device=device)
        w[0, 0] = weight
        x, small, grad_out = (
            torch.zeros(1, n, 1, 1, device=device) for n in (channels,) * 2 + (16,)
        )
        x[:, 0], small[:, 0], grad_out[:, 0] = value, weight, value
        out = conv_block(x, w, None, activation=None, pool_size=None)
        leaves = leaves_of(small, w)
        grads = gradients(
            conv_block(*leaves, None, activation=None, pool_size=None), leaves, grad_out
        )
        for result in (out, *grads):
            torch.testing.assert_close(result[0, 0].view(1).cpu(), product, equal_nan=True)


def test_nan_beats_infinity_and_keeps_its_gradient(device):
    nan, inf = float("nan"), float("inf")
    out, grad = pointwise([[inf, nan], [5, inf]], device)
    assert torch.tensor(out).isnan().all()
    assert grad == [[0, 1], [0, 0]]
    assert pointwise([[1, inf], [inf, 5]], device) == ([[inf]], [[0, 1], [0, 0]])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtypes", [DTYPES["float32"], DTYPES["bfloat16-float32"]], ids=str)
@pytest.mark.parametrize(
    "case", [*CORNERS, BY_NAME["cifar1"], BY_NAME["deep3"], BY_NAME["wide1"]], ids=lambda c: c.name
)
def test_nan_and_infinity_are_where_native_has_them(case, dtypes, layout, device):
    x, w, b, grad_out = integer_problem(case)
    g = torch.Generator().manual_seed(3)
    x = x.clone()
    for value, share in ((torch.nan, 0.01), (torch.inf, 0.005), (-torch.inf, 0.005)):
        x[torch.rand(x.shape, generator=g) < share] = value
    x[0, 0, :2, :2] = torch.nan  # several in one window
    in64 = leaves_of(x, w, b)
    native = reference.conv_block(*in64, **case.function_arguments)
    assert native.isnan().any()
    native_grads = gradients(native, in64, grad_out)

    to_device = (device, dtypes[0]), (device, dtypes[1]), (device, dtypes[1])
    tensors = [None if t is None else t.to(*to) for t, to in zip((x, w, b), to_device, strict=True)]
    leaves = leaves_of(with_layout(tensors[0], layout), *tensors[1:])
    out = conv_block(*leaves, **case.function_arguments)
    grads = gradients(out, leaves, grad_out.to(device, dtypes[0]))
    assert_same(out.detach().cpu(), native.detach().to(dtypes[0]), "out")
    # grad_weight is left out: the dense native sum multiplies NaN also with gradients of zero.
    for i in (0, *range(2, len(grads))):
        assert_same(grads[i].cpu(), native_grads[i].to(leaves[i].dtype), f"gradient {i}")
    assert not grads[1].isfinite().all()


@pytest.mark.parametrize("name", ["tails", "overlap", "groups", "gaps", "cifar3"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_overflowed_gradients_reach_every_parameter(name, value, device):
    case = replace(BY_NAME[name], padding=0)
    x, w, b, grad_out = (t.clone() for t in integer_problem(case))
    w[w == 0] = 1  # 0 x inf is summed only where native sums it
    x[x == 0] = 1
    with torch.no_grad():
        open_ = reference.conv_block(x, w, b, **case.function_arguments) > 0
    grad_out[tuple(open_.nonzero()[5])] = value
    in64 = leaves_of(x, w, b)
    native = reference.conv_block(*in64, **case.function_arguments)
    native_grads = gradients(native, in64, grad_out)
    leaves = leaves_of(*(t.float().to(device) for t in (x, w, b)))
    out = conv_block(*leaves, **case.function_arguments)
    ours = gradients(out, leaves, grad_out.float().to(device))
    for grad, expected in zip(ours, native_grads, strict=True):
        assert not grad.isfinite().all()
        assert_same(grad.cpu(), expected.float(), "gradient")


@every_dtype
@pytest.mark.parametrize("name", ["plain", "no-bias", "conv-only", "wide-window", "cifar1"])
def test_empty_batch(name, dtypes, device):
    case = replace(BY_NAME[name], batch=0)
    x, w, b, _ = random_problem(case, dtypes, device)
    leaves = leaves_of(x, w, b)
    out = conv_block(*leaves, **case.function_arguments)
    assert (
        out.shape
        == reference.conv_block(x.float(), w.float(), None, **case.function_arguments).shape
    )
    assert out.dtype == x.dtype
    for leaf, grad in zip(
        [t for t in leaves if t is not None], gradients(out, leaves, out), strict=True
    ):
        assert_same(grad, torch.zeros_like(leaf), "gradient")


@pytest.mark.parametrize("name", ["plain", "rect", "conv-only", "cifar1"])
def test_unbatched(name, device):
    case = BY_NAME[name]
    x, w, b, grad_out = (t.float().to(device) for t in integer_problem(replace(case, batch=1)))
    leaves, unbatched = leaves_of(x, w, b), leaves_of(x[0], w, b)
    out = conv_block(*leaves, **case.function_arguments)
    ours = conv_block(*unbatched, **case.function_arguments)
    assert_same(ours.detach(), out.detach()[0], "out")
    batched_grads = gradients(out, leaves, grad_out)
    grads = gradients(ours, unbatched, grad_out[0])
    assert_same(grads[0], batched_grads[0][0], "grad_input")
    for i in (1, 2):
        assert_same(grads[i], batched_grads[i], "gradient")


@every_layout
@pytest.mark.parametrize("name", ["plain", "tails", "conv-only", "cifar1", "cifar2"])
def test_output_and_gradient_keep_the_memory_format(name, layout, device):
    case = BY_NAME[name]
    x, w, b, _ = random_problem(case, DTYPES["float32"], device)
    x = with_layout(x, layout)
    channels_last = is_channels_last(layout)
    expected = torch.channels_last if channels_last else torch.contiguous_format
    leaves = leaves_of(x, w, b)
    out = conv_block(*leaves, **case.function_arguments)
    grads = gradients(out, leaves, torch.ones_like(out))
    assert out.is_contiguous(memory_format=expected)
    assert grads[0].is_contiguous(memory_format=expected)
    assert grads[1].is_contiguous()


@not_emulated
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_one_channel_takes_the_format_of_input_or_weight(input_format, weight_format, device):
    case = BY_NAME["mnist1-pool"]
    x, w, b, _ = random_problem(case, DTYPES["float32"], device)
    x, w = x.to(memory_format=input_format), w.to(memory_format=weight_format)
    native = reference.conv_block(x, w, b, **case.function_arguments)
    for to in (device, "meta"):
        out = conv_block(x.to(to), w.to(to), b.to(to), **case.function_arguments)
        assert out.stride() == native.stride()


@every_layout
@pytest.mark.parametrize("dtypes", [DTYPES["float32"], DTYPES["bfloat16-float32"]], ids=str)
@pytest.mark.parametrize("name", ["plain", "conv-only", "wide-window", "cifar1", "cifar2"])
def test_callers_tensors_are_never_written(name, dtypes, layout, device):
    case = BY_NAME[name]
    x, w, b, grad_out = random_problem(case, dtypes, device)
    x, w, grad_out = (with_layout(t, layout) for t in (x, w, grad_out))
    leaves = leaves_of(x, w, b)
    tensors = [*leaves, grad_out]
    before = [(t.detach().clone(), t._version) for t in tensors]
    out = conv_block(*leaves, **case.function_arguments)
    out_before = out.detach().clone()
    gradients(out, leaves, grad_out)
    assert_same(out.detach(), out_before, "out")
    for t, (values, version) in zip(tensors, before, strict=True):
        assert t._version == version
        assert_same(t.detach(), values, "caller's tensor")


@pytest.mark.parametrize("transform", ["jvp", "vjp", "vmap", "vmap-grad", "forward-mode"])
def test_torch_func(transform, device):
    case = BY_NAME["plain"]
    x, w, b, _ = random_problem(case, DTYPES["float32"], device)

    def apply(function):
        def f(x):
            return function(x, w, b, **case.function_arguments)

        if transform == "jvp":
            return torch.func.jvp(f, (x,), (x,))
        if transform == "vjp":
            out, pull = torch.func.vjp(f, x)
            return pull(torch.ones_like(out))
        if transform == "vmap":
            return torch.func.vmap(lambda x: f(x[None]))(x)
        if transform == "vmap-grad":
            return torch.func.vmap(torch.func.grad(lambda x: f(x[None]).square().sum()))(x)
        with torch.autograd.forward_ad.dual_level():
            dual = f(torch.autograd.forward_ad.make_dual(x, x))
            return torch.autograd.forward_ad.unpack_dual(dual).tangent

    ours, native = apply(conv_block), apply(reference.conv_block)
    torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-4)


def test_float32_weights_meet_half_precision_under_vmap(device):
    case = BY_NAME["plain"]
    x, w, b, _ = random_problem(case, DTYPES["bfloat16-float32"], device)
    ours = torch.func.vmap(lambda x: conv_block(x[None], w, b, **case.function_arguments))(x)
    expected = conv_block(x, w.to(x.dtype), b.to(x.dtype), **case.function_arguments)
    torch.testing.assert_close(ours[:, 0], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_changed_in_place_before_backward_is_an_error(changed, device):
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float32"], device)
    leaves = leaves_of(x, w, b)
    input = leaves[0] * 2
    out = conv_block(input, *leaves[1:])
    with torch.no_grad():
        {"input": input, "weight": leaves[1]}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def run(case, dtypes, device):
    *tensors, grad_out = random_problem(case, dtypes, device)
    leaves = leaves_of(*tensors)
    out = conv_block(*leaves, **case.function_arguments)
    return [out.detach(), *gradients(out, leaves, grad_out)]


REPEATED = ["plain", "tails", "overlap", "cifar1", "cifar2", "deep3", "lenet2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16-float32", "float16"])
@pytest.mark.parametrize("name", REPEATED)
def test_same_bits_every_time(name, dtype, device):
    first, second = (run(BY_NAME[name], DTYPES[dtype], device) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same(a, b, "second run")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16-float32"])
@pytest.mark.parametrize("name", REPEATED)
def test_same_bits_with_any_number_of_threads(name, dtype):
    case = replace(BY_NAME[name], batch=5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(run(case, DTYPES[dtype], "cpu"))
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


def test_images_more_than_two_billion_elements_apart(device):
    case = replace(BY_NAME["plain"], batch=2)
    x, w, b, grad_out = random_problem(case, DTYPES["bfloat16"], device)
    try:  # never filled: only the touched pages take memory
        memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)
    except RuntimeError:
        pytest.skip("no 4 GB of address space")

    def far(t, offset):
        return memory.as_strided(t.shape, (2**31, *t.stride()[1:]), offset).copy_(t)

    far_x, far_grad = far(x, 0), far(grad_out, x[0].numel())
    out, winner = forward_with_winner(x, w, b, case)
    assert_same(conv_block(far_x, w, b, **case.function_arguments), out, "out")
    expected = backward(grad_out, x, w, winner, case)
    for ours, near in zip(backward(far_grad, far_x, w, winner, case), expected, strict=True):
        assert_same(ours, near, "gradient")


# ------------------------------------------------------------------------- padding as a string


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (4, 3), (1, 1)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding, kernel, dilation, layout, device):
    case = ConvCase("", "", 3, 5, 9, 10, kernel=kernel, dilation=dilation, padding=padding)
    x, w, b, grad_out = integer_problem(case)
    in64 = leaves_of(x, w, b)
    expected = reference.conv_block(*in64, **case.function_arguments)
    expected_grads = gradients(expected, in64, grad_out)
    leaves = leaves_of(*(t.float().to(device) for t in (x, w, b)))
    leaves[0] = with_layout(leaves[0].detach(), layout).requires_grad_()
    out = conv_block(*leaves, **case.function_arguments)
    assert_same(out.detach().cpu(), expected.detach().float(), "out")
    for ours, exact in zip(
        gradients(out, leaves, grad_out.float().to(device)), expected_grads, strict=True
    ):
        assert_same(ours.cpu(), exact.float(), "gradient")


# ---------------------------------------------------------------------------- PyTorch's machinery


@not_emulated
@pytest.mark.parametrize(
    "name, dtype, layout",
    [
        ("plain", "float32", "contiguous"),
        ("rect", "float16-float32", "channels_last"),
        ("no-bias", "bfloat16", "sliced"),
        ("wide-window", "float32", "channels_last"),
        ("conv-only", "float64", "transposed"),
    ],
)
def test_opcheck(name, dtype, layout, device):
    case = BY_NAME[name]
    x, w, b, grad_out = random_problem(case, DTYPES[dtype], device)
    x, grad_out = with_layout(x, layout), with_layout(grad_out, layout)
    forward_op = functional._ops.conv_block_forward.default
    backward_op = functional._ops.conv_block_backward.default
    torch.library.opcheck(forward_op, (x, w, b, *positional(case), True))
    _, winner = forward_with_winner(x, w, b, case)
    needs = (layout != "contiguous", True, case.bias)
    torch.library.opcheck(backward_op, (grad_out, x, w, winner, *positional(case), *needs))


SMALL = [
    replace(BY_NAME[name], batch=2, height=7, width=8)
    for name in ("plain", "groups", "overlap", "pool-padded", "no-relu", "no-pool", "conv-only")
] + [BY_NAME["ceil-dropped"], replace(BY_NAME["rect"], batch=1)]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_gradcheck_and_gradgradcheck(case, device):
    leaves = leaves_of(*random_problem(case, DTYPES["float64"], device)[:3])
    f = functools.partial(conv_block, **case.function_arguments)
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)
    # What the second is made of, PyTorch's own kernels, adds in any order on CUDA.
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True, nondet_tol=1e-10)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_double_backward_is_native(case, device):
    tensors = random_problem(case, DTYPES["float64"], device)[:3]
    answers = []
    for f in (conv_block, reference.conv_block):
        leaves = leaves_of(*tensors)
        out = f(*leaves, **case.function_arguments)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        answers.append([*first, *torch.autograd.grad(penalty, leaves)])
    for ours, native in zip(*answers, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-10, atol=1e-10)


def test_double_backward_of_shut_windows_at_the_far_edge(device):
    """Their only place inside the map is the first one, the others lie in the padding."""
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, device=device)
    w = torch.randn(3, 2, 1, 1, dtype=torch.float64, device=device)
    answers = []
    for f in (conv_block, reference.conv_block):
        leaves = leaves_of(x, w, torch.full_like(w[:, 0, 0, 0], -3))
        out = f(*leaves, pool_size=2, pool_stride=2, pool_padding=1)
        assert (out == 0).any()
        answers.append(torch.autograd.grad(out.sum(), leaves, create_graph=True))
    for ours, native in zip(*answers, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bfloat16-float32"])
def test_create_graph_gives_the_same_first_gradients(dtype, device):
    case = BY_NAME["cifar2"]
    x, w, b, grad_out = random_problem(case, DTYPES[dtype], device)
    leaves = leaves_of(x, w, b)
    out = conv_block(*leaves, **case.function_arguments)
    wanted = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
    graph = torch.autograd.grad(out, leaves, grad_out, create_graph=True)
    for plain, with_graph in zip(wanted, graph, strict=True):
        assert with_graph.requires_grad and with_graph.dtype == plain.dtype
        scale = plain.abs().max()
        assert (plain - with_graph).abs().max() <= 8 * torch.finfo(x.dtype).eps * scale


def test_double_backward_where_the_weight_is_made_from_the_input(device):
    x, *_ = random_problem(replace(BY_NAME["plain"], batch=16), DTYPES["float64"], device)
    answers = []
    for f in (conv_block, reference.conv_block):
        (leaf,) = leaves_of(x)
        out = f(leaf, leaf[:, :, :3, :3].sin(), leaf.mean(dim=(1, 2, 3)), padding=1)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        answers.append((first, *torch.autograd.grad(first.square().sum(), leaf)))
    for ours, native in zip(*answers, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-10, atol=1e-10)


def test_func_grad(device):
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float64"], device)
    ours, native = (
        torch.func.grad(lambda w, b, f=f: f(x, w, b).square().sum(), argnums=(0, 1))(w, b)
        for f in (conv_block, reference.conv_block)
    )
    for a, b in zip(ours, native, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def compiled_and_eager(case, dtype, device, layout="contiguous", **compile_arguments):
    arguments = case.function_arguments

    def f(x, w, b):
        return conv_block(x.sin(), w, b, **arguments).tanh()

    compiled = torch.compile(f, fullgraph=True, **compile_arguments)
    x, w, b, grad_out = random_problem(case, DTYPES[dtype], device)
    results = []
    for function in (compiled, f):
        leaves = leaves_of(with_layout(x, layout), w, b)
        out = function(*leaves)
        results.append((out.detach(), *gradients(out, leaves, grad_out)))
    return zip(*results, strict=True)


@not_emulated
@pytest.mark.parametrize(
    "name, dtype, layout",
    [
        ("plain", "float32", "channels_last"),
        ("conv-only", "bfloat16", "contiguous"),
        ("wide-window", "float16-float32", "sliced"),
    ],
)
def test_compile_is_eager_bit_for_bit(name, dtype, layout, device):
    torch._dynamo.reset()
    for compiled, eager in compiled_and_eager(
        BY_NAME[name], dtype, device, layout, backend="aot_eager"
    ):
        assert_same(compiled, eager, "compiled")
        assert compiled.stride() == eager.stride()


@not_emulated
def test_compile_with_inductor(device):
    torch._dynamo.reset()
    for compiled, eager in compiled_and_eager(BY_NAME["cifar2"], "float32", device):
        torch.testing.assert_close(compiled, eager)


@not_emulated
def test_compile_once_for_every_batch_size(device):
    torch._dynamo.reset()
    case = BY_NAME["plain"]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(conv_block, fullgraph=True, backend=counter)
    for batch in (3, 5, 8):
        x, w, b, grad_out = random_problem(replace(case, batch=batch), DTYPES["float32"], device)
        torch._dynamo.mark_dynamic(x, 0)
        leaves = leaves_of(x, w, b)
        torch._dynamo.mark_dynamic(leaves[0], 0)
        out = compiled(*leaves, **case.function_arguments)
        expected = conv_block(*leaves, **case.function_arguments)
        assert_same(out.detach(), expected.detach(), "out")
        for ours, eager in zip(
            gradients(out, leaves, grad_out), gradients(expected, leaves, grad_out), strict=True
        ):
            assert_same(ours, eager, "gradient")
    assert counter.frame_count == 1


@not_emulated
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compile_under_autocast(dtype, device):
    torch._dynamo.reset()
    with torch.autocast(device.type, dtype=dtype):
        for compiled, eager in compiled_and_eager(
            BY_NAME["plain"], "float32", device, backend="aot_eager"
        ):
            assert_same(compiled, eager, "compiled")


@pytest.mark.parametrize("dtypes", [DTYPES["float32"], DTYPES["bfloat16-float32"]], ids=str)
@every_layout
@pytest.mark.parametrize("case", CORNERS, ids=lambda c: c.name)
def test_meta_tensors_get_shape_dtype_and_strides(case, layout, dtypes):
    def leaves(device):
        x, w, b, _ = random_problem(case, dtypes, device)
        return leaves_of(with_layout(x, layout), w, b)

    real, meta = leaves("cpu"), leaves("meta")
    real_out, meta_out = (conv_block(*t, **case.function_arguments) for t in (real, meta))
    pairs = [(meta_out, real_out)]
    pairs += zip(
        gradients(meta_out, meta, torch.ones_like(meta_out)),
        gradients(real_out, real, torch.ones_like(real_out)),
        strict=True,
    )
    for ours, expected in pairs:
        assert ours.device.type == "meta"
        assert (ours.shape, ours.dtype, ours.stride()) == (
            expected.shape,
            expected.dtype,
            expected.stride(),
        )


# -------------------------------------------------------------------------------------- autocast

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@HALVES
@pytest.mark.parametrize("name", ["plain", "tails", "no-relu", "cifar2", "mnist1-pool"])
def test_autocast_runs_in_its_dtype_within_native_error(name, dtype, device):
    case = BY_NAME[name]
    x, w, b, grad_out = random_problem(case, DTYPES["float32"], device)
    leaves, native_leaves, in64 = (
        leaves_of(x, w, b),
        leaves_of(x, w, b),
        leaves_of(x.double(), w.double(), b.double()),
    )
    with torch.autocast(device.type, dtype=dtype):
        out = conv_block(*leaves, **case.function_arguments)
        native = reference.conv_block(x, w, b, **case.function_arguments)
        _, winner = forward_with_winner(x.to(dtype), w, b, case)
        native_given_winner = reference.conv_block_given_winner(
            *native_leaves, winner, positional(case)
        )
    assert out.dtype == native.dtype == dtype
    exact = reference.conv_block(*in64, **case.function_arguments).detach()
    assert_error_within_twice_native(out.detach(), [native], exact, "out")

    grad_out = grad_out.to(dtype)
    _, exact_grads = given_winner_gradients(*in64, grad_out.double(), winner, case)
    grads = gradients(out, leaves, grad_out)
    native_grads = gradients(native_given_winner, native_leaves, grad_out)
    for grad, native_grad, exact_grad in zip(grads, native_grads, exact_grads, strict=True):
        assert grad.dtype == torch.float32
        assert_error_within_twice_native(grad, [native_grad], exact_grad, "gradient")


def test_autocast_keeps_float32_weight_gradients_unrounded(device):
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float32"], device)
    leaves = leaves_of(x, w, b)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = conv_block(*leaves)
    grads = gradients(out, leaves, torch.ones_like(out))
    assert (grads[1] != grads[1].bfloat16()).any()


def test_autocast_follows_the_innermost_region(device):
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float32"], device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert conv_block(x, w, b).dtype == torch.bfloat16
        with torch.autocast(device.type, dtype=torch.float16):
            assert conv_block(x, w, b).dtype == torch.float16
        with torch.autocast(device.type, enabled=False):
            assert conv_block(x, w, b).dtype == torch.float32
        assert conv_block(x, w, b).dtype == torch.bfloat16
    assert conv_block(x, w, b).dtype == torch.float32


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("b_dtype", [torch.float32, torch.bfloat16], ids=str)
@HALVES
def test_autocast_takes_any_mix_of_dtypes(dtype, b_dtype, w_dtype, x_dtype, device):
    x, w, b, grad_out = (t.to(device) for t in integer_problem(BY_NAME["plain"]))
    expected, *_, expected_grads = integer_answer(BY_NAME["plain"])
    leaves = leaves_of(x.to(x_dtype), w.to(w_dtype), b.to(b_dtype))
    with torch.autocast(device.type, dtype=dtype):
        out = conv_block(*leaves, padding=1)
    assert_same(out.detach().cpu(), expected.to(dtype), "out")
    for leaf, grad, exact in zip(
        leaves, gradients(out, leaves, grad_out.to(dtype)), expected_grads, strict=True
    ):
        assert grad.dtype == leaf.dtype
        assert (grad.cpu() - exact).abs().max() <= 0.01 * exact.abs().max()


def test_autocast_leaves_float64_alone(device):
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float64"], device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = conv_block(x, w, b)
    assert_same(out, conv_block(x, w, b), "out")


# ---------------------------------------------------------------------------------------- errors


ones = torch.ones
GOOD = {"input": ones(2, 4, 8, 8), "weight": ones(6, 4, 3, 3), "bias": ones(6)}
# name: (what differs from GOOD, message)
BAD = {
    "input-1d": ({"input": ones(8)}, r"input must be 3D .* or 4D .*, got \(8,\)"),
    "input-2d": ({"input": ones(8, 8)}, r"input must be 3D .* or 4D .*, got \(8, 8\)"),
    "input-5d": ({"input": ones(1, 1, 4, 8, 8)}, r"input must be 3D .*, got \(1, 1, 4, 8, 8\)"),
    "input-list": ({"input": [1.0]}, r"input must be a Tensor, got list"),
    "input-channels": ({"input": ones(2, 5, 8, 8)}, r"input must have 4 channels .*, got 5"),
    "unbatched-channels": ({"input": ones(5, 8, 8)}, r"input must have 4 channels .*, got 5"),
    "no-channels": (
        {"input": ones(2, 0, 8, 8), "weight": ones(6, 0, 3, 3)},
        r"input must have .*, got \(2, 0, 8, 8\)",
    ),
    "no-rows": (
        {"input": ones(2, 4, 0, 8), "padding": 2},
        r"input must have .*, got \(2, 4, 0, 8\)",
    ),
    "input-int": ({"input": ones(2, 4, 8, 8).long()}, r"input must be float32.*, got Long"),
    "all-bool": ({n: t.bool() for n, t in GOOD.items()}, r"input must be float32.*, got Bool"),
    "weight-none": ({"weight": None}, r"weight must be a Tensor, got NoneType"),
    "weight-3d": ({"weight": ones(6, 4, 3)}, r"weight must be 4D .*, got \(6, 4, 3\)"),
    "weight-3d-same": (
        {"weight": ones(6, 4, 3), "padding": "same"},
        r"weight must be 4D .*, got \(6, 4, 3\)",
    ),
    "weight-float64": (
        {"weight": GOOD["weight"].double()},
        r"weight must be Float like input, got Double",
    ),
    "weight-half": (
        {"weight": GOOD["weight"].bfloat16()},
        r"weight must be Float like input, got BFloat16",
    ),
    "weight-other-half": (
        {"input": GOOD["input"].bfloat16(), "weight": GOOD["weight"].half()},
        r"weight must be BFloat16 like input or Float, got Half",
    ),
    "no-outputs": (
        {"weight": ones(0, 4, 3, 3), "bias": ones(0)},
        r"out_channels must be a positive multiple of groups \(1\), got 0",
    ),
    "no-kernel": ({"weight": ones(6, 4, 0, 3)}, r"weight must have .*, got \(6, 4, 0, 3\)"),
    "bias-int": ({"bias": 3}, r"bias must be a Tensor, got int"),
    "bias-length": ({"bias": ones(5)}, r"bias must have shape \(6,\), got \(5,\)"),
    "bias-2d": ({"bias": ones(6, 1)}, r"bias must have shape \(6,\), got \(6, 1\)"),
    "bias-0d": ({"bias": torch.tensor(1.0)}, r"bias must have shape \(6,\), got \(\)"),
    "bias-float64": ({"bias": ones(6).double()}, r"bias must be Float like weight, got Double"),
    "groups-channels": ({"groups": 3}, r"input must have 12 channels .*, got 4"),
    "groups-outputs": (
        {"weight": ones(5, 2, 3, 3), "bias": ones(5), "groups": 2},
        r"out_channels must be a positive multiple of groups \(2\), got 5",
    ),
    "groups-0": ({"groups": 0}, r"groups must be at least 1, got 0"),
    "groups-negative": ({"groups": -1}, r"groups must be at least 1, got -1"),
    "groups-float": ({"groups": 1.0}, r"groups must be an int, got 1.0"),
    "padding-name": ({"padding": "full"}, r"padding must be .*, got 'full'"),
    "same-strided": ({"padding": "same", "stride": 2}, r'padding="same" needs stride 1, got 2'),
    "same-input-1d": ({"input": ones(64), "padding": "same"}, r"input must be .*, got \(64,\)"),
    "same-dilation": (
        {"padding": "same", "dilation": 1.5},
        r"dilation must be an int or 2 ints, got 1.5",
    ),
    "kernel-too-large": (
        {"input": ones(2, 4, 2, 8)},
        r"kernel size .*3 x 3.* can't be greater than the padded input \(2 x 8\)",
    ),
    "dilated-too-large": (
        {"dilation": 4},
        r"kernel size .*9 x 9.* can't be greater than the padded input \(8 x 8\)",
    ),
    "pool-too-large": ({"pool_size": 7}, r"pool_size \(7, 7\) can't be .* map \(6 x 6\)"),
    "pool-too-wide": ({"pool_size": (2, 7)}, r"pool_size \(2, 7\) can't be .* map \(6 x 6\)"),
    "pool-padding-half": (
        {"pool_padding": 2},
        r"pool_padding must be at most half of pool_size \(2, 2\), got \(2, 2\)",
    ),
    "pool-padding-odd": (
        {"pool_size": 3, "pool_padding": 2},
        r"pool_padding must be at most half of pool_size \(3, 3\), got \(2, 2\)",
    ),
    "ceil-mode": ({"ceil_mode": 1}, r"ceil_mode must be a bool, got 1"),
}
LEAST = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "pool_size": 1,
    "pool_stride": 1,
    "pool_padding": 0,
}
for name, least in LEAST.items():
    for value, message in {
        least - 1: rf"{name} must be at least {least}, got \({least - 1}, {least - 1}\)",
        (2, -3): rf"{name} must be at least {least}, got \(2, -3\)",
        (1, 1, 1): rf"{name} must be an int or 2 ints, got \(1, 1, 1\)",
        1.5: rf"{name} must be an int or 2 ints, got 1.5",
        (1, 1.5): rf"{name} must be an int or 2 ints, got \(1, 1.5\)",
        "one": rf"{name} must be .*ints, got 'one'",
    }.items():
        BAD[f"{name}={value}"] = ({name: value}, message)


def raised_by(f, arguments):
    try:
        f(**arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_error_is_of_native_type_and_says_what_came(bad, device):
    difference, message = bad
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in {**GOOD, **difference}.items()
    }
    ours = raised_by(conv_block, arguments)
    native = raised_by(reference.conv_block, arguments)
    # NotImplementedError is the RuntimeError with which PyTorch refuses some dtypes.
    assert type(ours) is (RuntimeError if isinstance(native, RuntimeError) else type(native))
    assert re.match(f"conv_block: {message}", str(ours))


def test_unknown_activation_is_a_value_error():
    with pytest.raises(ValueError, match=r"conv_block: activation must be .*, got 'gelu'"):
        conv_block(ones(1, 4, 8, 8), ones(6, 4, 3, 3), activation="gelu")


@not_emulated
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_tensors_on_different_devices_are_an_error(which, grad, device):
    other = "meta" if device.type == "cpu" else "cpu"
    tensors = {
        name: t.detach().to(other if name == which else device).requires_grad_(grad)
        for name, t in GOOD.items()
    }
    with pytest.raises(RuntimeError, match=r"conv_block: \w+ must be on the device of input .*got"):
        conv_block(**tensors)


def test_backward_op_checks_what_it_gets(device):
    case = BY_NAME["plain"]
    x, w, b, grad_out = random_problem(case, DTYPES["float32"], device)
    _, winner = forward_with_winner(x, w, b, case)
    for bad, message in (
        ((grad_out[:, :, 1:], x, w, winner), r"grad_out must have shape \(3, 16, 5, 6\), got"),
        ((grad_out[0], x, w, winner), r"grad_out must have shape"),
        ((grad_out.double(), x, w, winner), r"grad_out must be Float like input, got Double"),
        ((grad_out, x, w, winner[1:]), r"winner must be the one .*, got \(2, 5, 6, 16\) Byte"),
        ((grad_out, x, w, winner.int()), r"winner must be the one .*, got .* Int"),
        ((grad_out, x, w, winner[..., :0]), r"winner must be the one"),
        ((grad_out, x[:, 1:], w, winner), r"input must have 8 channels .*, got 7"),
    ):
        with pytest.raises(RuntimeError, match=f"conv_block_backward: {message}"):
            backward(*bad, case)


def test_integers_of_any_kind_are_arguments(device):
    numpy = pytest.importorskip("numpy")
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float32"], device)
    expected = conv_block(x, w, b, padding=1, pool_size=2)
    assert_same(conv_block(x, w, b, padding=numpy.int64(1), pool_size=[2, 2]), expected, "out")
    assert_same(conv_block(x, w, b, (1,), [1], pool_size=torch.tensor(2)), expected, "out")
