"""cross_entropy under autocast, autograd, torch.func and torch.compile, and of meta tensors."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_problems import (
    DTYPES,
    REDUCTIONS,
    class_weight,
    in_dtype,
    make_case,
    value_and_grad,
)

from fastcls import FusedCrossEntropyLoss
from fastcls.functional import cross_entropy, cross_entropy_with_hits


def exported(input, target, weight=None, reduction="mean", label_smoothing=0.0, hits=False):
    """The op of exported programs."""
    op = torch.ops.fastcls.cross_entropy_with_hits if hits else torch.ops.fastcls.cross_entropy
    return op.default(input, target, weight, -100, REDUCTIONS.index(reduction), label_smoothing)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batched_gradients(device, reduction):
    input, target = make_case((6, 5), "ignore", device=device)
    input.requires_grad_()
    losses = [f(input, target, reduction=reduction) for f in (cross_entropy, F.cross_entropy)]
    grads = torch.linspace(-1, 2, 3 * losses[0].numel(), device=device)
    grads = grads.view(3, *losses[0].shape)
    for _ in range(2):  # the second time over a graph that has been used
        ours, native = (
            torch.autograd.grad(loss, input, grads, is_grads_batched=True, retain_graph=True)[0]
            for loss in losses
        )
        torch.testing.assert_close(ours, native)


@pytest.mark.parametrize("active", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["ignore", "prob"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(device, dtype, kind, active):
    input, target = make_case((33, 10), kind, dtype, device)
    weight = class_weight(10, device=device).to(dtype)
    with torch.autocast(input.device.type, active):
        loss, grad = value_and_grad(cross_entropy, input, target, weight=weight)
    wide = torch.promote_types(dtype, torch.float32)
    expected, expected_grad = value_and_grad(
        F.cross_entropy, input.to(wide), in_dtype(target, wide), weight=weight.to(wide)
    )
    assert loss.dtype == wide and grad.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad.to(dtype))


GRADCHECK_CASES = list(itertools.product(["ignore", "prob"], [False, True], [0.0, 0.2], REDUCTIONS))


@pytest.mark.parametrize("kind, weighted, smoothing, reduction", GRADCHECK_CASES)
def test_gradcheck(device, kind, weighted, smoothing, reduction):
    input, target = make_case((4, 3, 2), kind, torch.float64, device, scale=1.0)
    weight = class_weight(3, torch.float64, device) if weighted else None

    def function(x):
        return cross_entropy(x, target, weight, -100, reduction, smoothing)

    assert torch.autograd.gradcheck(function, input.requires_grad_())
    assert torch.autograd.gradgradcheck(function, input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_double_backward_in_lower_precision(device, dtype):
    def hessian_vector(function, x, t):
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(function(x, t), x, create_graph=True)
        return torch.autograd.grad((grad * direction.to(grad.dtype)).sum(), x)[0]

    input, target = make_case((6, 5), "ignore", dtype, device)
    direction = torch.linspace(-1, 1, 30, device=device).view(6, 5)
    ours = hessian_vector(cross_entropy, input, target)
    exact = hessian_vector(F.cross_entropy, input.double(), target)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


def test_gradients_of_probabilities_and_their_weight(device):
    input, target = make_case((6, 5), "prob", torch.float64, device)
    weight = class_weight(5, torch.float64, device)
    tensors = [t.requires_grad_() for t in (input, target, weight)]
    assert torch.autograd.gradcheck(cross_entropy, tensors)


def test_weight_of_indices_has_no_gradient_as_in_pytorch(device):
    input, target = make_case((6, 5), "index", device=device)
    weight = class_weight(5, device=device).requires_grad_()
    with pytest.raises(RuntimeError, match="weight"):
        cross_entropy(input, target, weight)
    with torch.no_grad():
        cross_entropy(input, target, weight)


@pytest.mark.parametrize("kind", ["ignore", "prob"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_opcheck(device, kind, reduction):
    ops, code = torch.ops.fastcls, REDUCTIONS.index(reduction)
    for dtype, float_loss in [(torch.float32, False), (torch.bfloat16, True)]:
        input, target = make_case((4, 6, 3), kind, dtype, device)
        weight = class_weight(6, device=device)
        weight = weight if dtype.itemsize == 2 else weight.to(dtype)
        settings = (-100, code, 0.1)
        for save, count_hits in itertools.product((0, 1, 2), {kind == "ignore", False}):
            arguments = (input, target, weight, *settings, float_loss, save, count_hits)
            torch.library.opcheck(ops.cross_entropy_forward.default, arguments)
        arguments = (input, target, weight, *settings, float_loss, 1, False)
        loss, saved, _ = ops.cross_entropy_forward(*arguments)
        torch.library.opcheck(
            ops.cross_entropy_backward.default,
            (torch.ones_like(loss), input, target, weight, saved, *settings),
        )


@pytest.mark.parametrize("kind", ["ignore", "prob"])
def test_opcheck_of_the_exported_ops(device, kind):
    input, target = make_case((4, 6, 3), kind, device=device)
    weight = class_weight(6, device=device)
    ops = torch.ops.fastcls
    for x in (input, input.clone().requires_grad_()):
        arguments = (x, target, weight, -100, 1, 0.1)
        torch.library.opcheck(ops.cross_entropy.default, arguments)
        if kind == "ignore":
            torch.library.opcheck(ops.cross_entropy_with_hits.default, arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["ignore", "prob"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_exported_op_does_what_the_function_does(device, dtype, kind, reduction):
    input, target = make_case((33, 10), kind, dtype, device)
    arguments = {"reduction": reduction, "label_smoothing": 0.1}
    for active in (None, torch.bfloat16):
        with torch.autocast(input.device.type, active, enabled=active is not None):
            torch.testing.assert_close(
                value_and_grad(exported, input, target, **arguments),
                value_and_grad(cross_entropy, input, target, **arguments),
            )


def test_hits_of_the_exported_op(device):
    input, target = make_case((33, 10), "ignore", device=device)
    results = []
    for f in (functools.partial(exported, hits=True), cross_entropy_with_hits):
        x = input.clone().requires_grad_()
        loss, hits = f(x, target)
        assert loss.requires_grad and not hits.requires_grad
        results.append((hits, loss.detach(), *torch.autograd.grad(loss, x)))
    torch.testing.assert_close(*results)


def test_gradients_of_probabilities_through_the_exported_op(device):
    input, target = make_case((6, 5), "prob", torch.float64, device)
    tensors = [t.requires_grad_() for t in (input, target, class_weight(5, torch.float64, device))]
    assert torch.autograd.gradcheck(exported, tensors)
    assert torch.autograd.gradgradcheck(exported, tensors)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_loss_alone(device, strict):
    """Its logits need no gradient while it is exported."""
    loss = FusedCrossEntropyLoss(class_weight(5), label_smoothing=0.1).to(device)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        loss,
        make_case((6, 5), "ignore", device=device),
        dynamic_shapes=({0: rows},) * 2,
        strict=strict,
    )
    case = make_case((9, 5), "ignore", device=device)
    torch.testing.assert_close(value_and_grad(program.module(), *case), value_and_grad(loss, *case))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_compile(device, kind, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 9):
        input, target = make_case((rows, 5), kind, device=device)
        for reduction in REDUCTIONS:
            arguments = {"reduction": reduction, "label_smoothing": 0.1}
            torch.testing.assert_close(
                value_and_grad(compiled, input, target, **arguments),
                value_and_grad(cross_entropy, input, target, **arguments),
            )


def test_compile_with_inductor_under_autocast(device):
    torch._dynamo.reset()

    def step(x, w, t):
        with torch.autocast(x.device.type, torch.bfloat16):
            return cross_entropy(x @ w, t)

    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 4, generator=generator), torch.randn(4, 5, generator=generator)
    x, w = x.to(device), w.to(device).requires_grad_()
    target = torch.arange(8, device=device) % 5
    loss = torch.compile(step, fullgraph=True)(x, w, target)
    expected = step(x, w, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-3)
    grads = [torch.autograd.grad(value, w)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-2)


def test_func_grad_and_hessian(device):
    input, target = make_case((6, 5), "index", device=device)
    expected = torch.func.grad(F.cross_entropy)(input, target)
    torch.testing.assert_close(torch.func.grad(cross_entropy)(input, target), expected)
    hessian = torch.func.grad(lambda x: torch.func.grad(cross_entropy)(x, target).square().sum())
    native = torch.func.grad(lambda x: torch.func.grad(F.cross_entropy)(x, target).square().sum())
    torch.testing.assert_close(hessian(input), native(input))


TRANSFORMS = {
    "jvp": lambda loss, x: torch.func.jvp(loss, (x,), (x,)),
    "vjp": lambda loss, x: torch.func.vjp(loss, x)[1](torch.ones((), device=x.device)),
    "jacfwd": lambda loss, x: torch.func.jacfwd(loss)(x),
    "jacrev": lambda loss, x: torch.func.jacrev(loss)(x),
    "hessian": lambda loss, x: torch.func.hessian(loss)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("function", [cross_entropy, exported], ids=["function", "exported op"])
def test_torch_func(device, transform, function):
    input, target = make_case((6, 5), "index", device=device)
    ours, native = (
        TRANSFORMS[transform](lambda x, f=f: f(x, target), input)
        for f in (function, F.cross_entropy)
    )
    torch.testing.assert_close(ours, native)


def test_forward_mode(device):
    input, target = make_case((6, 5), "index", device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, input)
        ours, native = (
            torch.autograd.forward_ad.unpack_dual(f(dual, target)).tangent
            for f in (cross_entropy, F.cross_entropy)
        )
    torch.testing.assert_close(ours, native)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_pass_within_vmap(device, dtype):
    input, target = make_case((6, 5), "index", dtype, device)
    rows = torch.eye(6, dtype=dtype, device=device)

    def jacobian(loss):
        x = input.clone().requires_grad_()
        losses = loss(x, target, reduction="none")
        return torch.vmap(lambda v: torch.autograd.grad(losses, x, v, retain_graph=True)[0])(rows)

    torch.testing.assert_close(
        jacobian(cross_entropy), jacobian(F.cross_entropy), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["index", "prob"])
def test_vmap(device, kind):
    cases = [make_case((6, 5), kind, device=device, seed=seed) for seed in range(3)]
    inputs, targets = (torch.stack(tensors) for tensors in zip(*cases, strict=True))
    for transform in (torch.func.vmap, lambda loss: torch.func.vmap(torch.func.grad(loss))):
        *ours, native = (
            transform(loss)(inputs, targets) for loss in (cross_entropy, exported, F.cross_entropy)
        )
        for results in ours:
            torch.testing.assert_close(results, native)


def test_module(device):
    module = FusedCrossEntropyLoss(class_weight(10), label_smoothing=0.1).to(device)
    native = torch.nn.CrossEntropyLoss(class_weight(10), label_smoothing=0.1).to(device)
    input, target = make_case((7, 10), "index", device=device)
    for loss in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(loss(input, target), native(input, target))
    module.load_state_dict(native.state_dict())
    assert repr(module) == "FusedCrossEntropyLoss()"


def test_meta_tensors():
    input = torch.empty(4, 5, device="meta", requires_grad=True)
    loss = cross_entropy(input, torch.empty(4, device="meta", dtype=torch.int64))
    loss.backward()
    assert loss.shape == () and input.grad.shape == input.shape
