"""conv_block under autograd, torch.func, torch.compile and autocast, and of meta tensors."""

import functools
from dataclasses import replace

import pytest
import torch
from cases import CORNERS
from conv_block_problems import (
    BY_NAME,
    DTYPES,
    every_layout,
    forward_with_winner,
    given_winner_gradients,
    gradients,
    integer_answer,
    integer_problem,
    leaves_of,
    not_emulated,
    positional,
    random_problem,
)
from helpers import assert_error_within_twice_native, assert_same, with_layout

from fastcls import reference
from fastcls._arguments import conv_block_arguments
from fastcls.functional import conv_block
from fastcls.ops import conv_block as op


def exported(x, w, b=None, **arguments):
    """The op of exported programs."""
    return torch.ops.fastcls.conv_block.default(x, w, b, *conv_block_arguments(**arguments))


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


TRANSFORMS = ["jvp", "vjp", "vmap", "vmap-grad", "forward-mode"]


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", [conv_block, exported], ids=["function", "exported op"])
def test_torch_func(function, transform, device):
    case = BY_NAME["plain"]
    x, w, b, _ = random_problem(case, DTYPES["float32"], device)

    def apply(block):
        def f(x):
            return block(x, w, b, **case.function_arguments)

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

    ours, native = apply(function), apply(reference.conv_block)
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
    forward_op = op._ops.conv_block_forward.default
    backward_op = op._ops.conv_block_backward.default
    torch.library.opcheck(forward_op, (x, w, b, *positional(case), True))
    _, winner = forward_with_winner(x, w, b, case)
    needs = (layout != "contiguous", True, case.bias)
    torch.library.opcheck(backward_op, (grad_out, x, w, winner, *positional(case), *needs))


@not_emulated
@pytest.mark.parametrize("name, dtype", [("plain", "float32"), ("conv-only", "bfloat16-float32")])
def test_opcheck_of_the_exported_op(name, dtype, device):
    case = BY_NAME[name]
    tensors = random_problem(case, DTYPES[dtype], device)[:3]
    op = torch.ops.fastcls.conv_block.default
    for inputs in (tensors, leaves_of(*tensors)):
        inputs = [*inputs, None][:3]
        torch.library.opcheck(op, (*inputs, *positional(case)))


@not_emulated
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["plain", "no-bias", "wide-window", "no-relu"])
def test_the_exported_op_does_what_the_function_does(name, mode, device):
    case = BY_NAME[name]
    x, w, b, grad_out = random_problem(case, DTYPES["float32"], device)
    with mode():
        results = []
        for f in (exported, conv_block):
            leaves = leaves_of(x.clone(), w.clone(), None if b is None else b.clone())
            out = f(*leaves, **case.function_arguments)
            results.append([out.detach()])
            if out.requires_grad:
                results[-1] += gradients(out, leaves, grad_out)
    assert (len(results[0]) > 1) == (mode is torch.enable_grad)
    for ours, expected in zip(*results, strict=True):
        assert_same(ours, expected, mode.__name__)


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
