"""conv_block at the corners: ties, NaN, infinities, empty and unbatched inputs, memory formats."""

import math
from dataclasses import replace

import pytest
import torch
from cases import CORNERS, ConvCase
from conv_block_problems import (
    BY_NAME,
    DTYPES,
    backward,
    every_dtype,
    every_layout,
    forward_with_winner,
    gradients,
    integer_problem,
    leaves_of,
    not_emulated,
    random_problem,
)
from helpers import assert_same, is_channels_last, with_layout

from fastcls import reference
from fastcls.functional import conv_block


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


@pytest.mark.parametrize("dtypes", [DTYPES["float32"], DTYPES["bfloat16"]], ids=str)
@pytest.mark.parametrize("channels", [3, 16])
def test_rows_of_padding_that_32_bits_cannot_count(channels, dtypes, device):
    sizes = dict(height=1, width=8, kernel=(17, 1), padding=(8, 0), batch=1)
    case = ConvCase("far-padding", "one row, far from none", channels, 8, **sizes, pool_size=None)
    dtype, param_dtype = dtypes
    x, w, b, grad_out = integer_problem(case)
    x, grad_out = x.to(device, dtype), grad_out.to(device, dtype)
    w, b = (t.to(device, param_dtype) for t in (w, b))
    x = with_layout(x, "channels_last")
    far_x = x.as_strided(x.shape, (8 * channels, 1, 2**28, channels))  # its only row is near
    results = []
    for tensor in (x, far_x):
        leaves = leaves_of(tensor, w, b)
        out = conv_block(*leaves, **case.function_arguments)
        results.append([out.detach(), *gradients(out, leaves, grad_out)])
    for near, far in zip(*results, strict=True):
        assert_same(far, near, "output or gradient")


@pytest.mark.parametrize("stride", [2**16, 2**31 - 1])
def test_steps_that_are_never_taken(stride, device):
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float32"], device)
    w = w[..., : x.shape[2], : x.shape[3]]
    results = []
    for step in (1, stride):
        leaves = leaves_of(x[..., : w.shape[2], : w.shape[3]], w, b)
        out = conv_block(*leaves, stride=step, pool_size=1, pool_stride=step)
        results.append([out.detach(), *gradients(out, leaves, torch.ones_like(out))])
    for near, far in zip(*results, strict=True):
        assert_same(far, near, "output or gradient")


@pytest.mark.parametrize("name", ["deep2", "wide1", "plain"])
def test_winners_that_come_back_at_odd_addresses(name, device):
    case = BY_NAME[name]
    x, w, b, grad_out = random_problem(case, DTYPES["bfloat16"], device)
    x, grad_out = (with_layout(t, "channels_last") for t in (x, grad_out))
    leaves = leaves_of(x, w, b)

    def moved(t):
        if t.dtype != torch.uint8:
            return t
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
        return memory[1:].as_strided(t.shape, t.stride()).copy_(t)

    expected = gradients(conv_block(*leaves, **case.function_arguments), leaves, grad_out)
    with torch.autograd.graph.saved_tensors_hooks(moved, lambda t: t):
        out = conv_block(*leaves, **case.function_arguments)
    for ours, plain in zip(gradients(out, leaves, grad_out), expected, strict=True):
        assert_same(ours, plain, "gradient")


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
