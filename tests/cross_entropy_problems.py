"""Inputs of the tests of cross_entropy, and the comparison with PyTorch."""

import torch
import torch.nn.functional as F
from helpers import assert_error_within_twice_native

from fastcls import reference
from fastcls.functional import cross_entropy, cross_entropy_with_hits

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INDEX_DTYPES = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
REDUCTIONS = ["none", "mean", "sum"]
IGNORED = -100

# (shape of the logits, what it is for)
SHAPES = [
    ((10,), "one row without a batch"),
    ((2, 1), "one class: loss and gradient are 0"),
    ((5, 2), "fewer rows and classes than a vector has lanes"),
    ((37, 10), "few classes, whole vectors of rows and a rest"),
    ((3, 17), "odd number of classes"),
    ((19, 100), "a hundred classes"),
    ((3, 1000), "a thousand classes"),
    ((2, 5003), "more classes than a block of rows holds elements of a row"),
    ((2, 7, 9), "classes strided, rows next to each other"),
    ((2, 3, 4, 5), "segmentation map"),
    ((2, 300, 3, 6), "a tile of strided classes that outgrows the stack"),
    ((2, 33, 2, 3, 2), "five dimensions"),
]
SHAPE_IDS = ["x".join(map(str, shape)) for shape, _ in SHAPES]


def batch_shape(shape):
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


def make_case(shape, kind, dtype=torch.float32, device="cpu", seed=0, scale=3.0):
    """Logits and target; 30 % of the rows of an index target are ignored, never the first one."""
    generator = torch.Generator().manual_seed(seed)
    class_dim = 1 if len(shape) > 1 else 0
    input = (torch.randn(shape, generator=generator) * scale).to(dtype)
    if kind == "prob":
        target = torch.rand(shape, generator=generator).softmax(class_dim).to(dtype)
    else:
        rows = batch_shape(shape)
        target = torch.randint(shape[class_dim], rows, generator=generator)
        if kind == "ignore":
            target[torch.rand(rows, generator=generator) < 0.3] = IGNORED
            target.view(-1)[:1] = shape[class_dim] - 1
    return input.to(device), target.to(device)


def with_strided_classes(input):
    """Logits [N, C] of which the rows lie side by side."""
    return input.t().contiguous().t()


def class_weight(C, dtype=torch.float32, device="cpu"):
    return (torch.arange(C) % 5 * 0.3 + 0.2).to(device, dtype)


def value_and_grad(function, input, target, **arguments):
    """Loss, and gradient of the logits under a fixed, uneven gradient of the loss."""
    input = input.detach().requires_grad_()
    loss = function(input, target, **arguments)
    grad_loss = torch.linspace(0.5, 1.5, max(loss.numel(), 1), device=loss.device)
    grad_loss = grad_loss[: loss.numel()].view(loss.shape).to(loss.dtype)
    (grad,) = torch.autograd.grad(loss, input, grad_loss)
    return loss.detach(), grad


def in_dtype(target, dtype):
    return target.to(dtype) if target.is_floating_point() else target


def scale_of(t):
    return t.abs().max().item() if t.numel() else 0.0


def assert_like_native(input, target, weight=None, what="", **arguments):
    """Loss and gradient as good as those of PyTorch in float32, both against float64."""

    def native(dtype):
        w = None if weight is None else weight.to(dtype)
        x, t = input.to(dtype), in_dtype(target, dtype)
        return value_and_grad(reference.cross_entropy, x, t, weight=w, **arguments)

    ours = value_and_grad(cross_entropy, input, target, weight=weight, **arguments)
    exact = native(torch.float64)
    single = native(torch.promote_types(input.dtype, torch.float32))
    for name, mine, theirs, true in zip(("loss", "grad"), ours, single, exact, strict=True):
        assert mine.dtype == input.dtype
        if input.dtype == torch.float64:  # the reference's own rounding is as large as ours
            torch.testing.assert_close(mine, true, rtol=1e-11, atol=1e-13 * scale_of(true))
            continue
        assert_error_within_twice_native(mine, [theirs.to(mine.dtype)], true, f"{what} {name}")


EDGE_ROWS = {
    "-inf beside the target": ([0.0, -INF, 1.0, 2.0, 3.0], 0),
    "-inf at the target": ([0.0, -INF, 1.0, 2.0, 3.0], 1),
    "one finite logit": ([-INF, -INF, 1.0, -INF, -INF], 2),
    "all -inf": ([-INF] * 5, 0),
    "+inf": ([0.0, INF, 1.0, 2.0, 3.0], 0),
    "+inf at the target": ([0.0, INF, 1.0, 2.0, 3.0], 1),
    "nan": ([0.0, NAN, 1.0, 2.0, 3.0], 0),
    "nan at the end": ([0.0, 1.0, 2.0, 3.0, NAN], 0),
    "all nan": ([NAN] * 5, 0),
    "-inf in an ignored row": ([0.0, -INF, 1.0, 2.0, 3.0], IGNORED),
}
EMPTY_SHAPES = [(0, 5), (0, 5, 3), (4, 5, 0), (4, 0)]


def check_empty(shape, kind, device):
    input = torch.randn(shape, device=device)
    if kind == "prob":
        target = torch.rand(shape, device=device)
    else:
        target = torch.full(batch_shape(shape), IGNORED, device=device)
    for reduction in REDUCTIONS:
        ours = value_and_grad(cross_entropy, input, target, reduction=reduction)
        native = value_and_grad(F.cross_entropy, input, target, reduction=reduction)
        torch.testing.assert_close(ours, native, equal_nan=True)


SHAPES_FOR_MEANS = [*(shape for shape, _ in SHAPES), (40, 2), (40, 24), (40, 300)]


def check_mean_over_nothing(shape, dtype, smoothing, device):
    input = torch.randn(shape, device=device).to(dtype)
    target = torch.full(batch_shape(shape), IGNORED, device=device)
    loss, grad = value_and_grad(cross_entropy, input, target, label_smoothing=smoothing)
    assert loss.isnan() and (grad == 0).all()
    without = torch.ones(shape[min(1, len(shape) - 1)], device=device, dtype=dtype)
    without[0] = 0  # of class 0 alone: with smoothing finite / 0
    for weight in (torch.zeros_like(without), without):
        arguments = {"weight": weight, "label_smoothing": smoothing}
        loss, grad = value_and_grad(cross_entropy, input, target.clamp(min=0), **arguments)
        assert loss.isnan() and grad.isnan().all()


def check_mean_over_one_row_without_weight(classes, smoothing, device):
    """0 / 0 for the row that is not ignored, 0 for those that are."""
    input, target = torch.randn(40, classes, device=device), torch.full((40,), IGNORED)
    target[3] = 1
    arguments = {"weight": torch.zeros(classes, device=device), "label_smoothing": smoothing}
    loss, grad = value_and_grad(cross_entropy, input, target.to(device), **arguments)
    assert loss.isnan() and grad[3].isnan().all()
    assert (grad[target == IGNORED] == 0).all()


def assert_hits(input, target, **arguments):
    """Hits as argmax counts them; loss and gradient the same as without counting."""
    right = (input.argmax(min(1, input.dim() - 1)) == target) & (target != IGNORED)
    with torch.no_grad():
        loss, hits = cross_entropy_with_hits(input, target, **arguments)
    assert hits.dtype == torch.int64 and hits.shape == () and hits.device == input.device
    assert hits == right.sum()
    x = input.detach().requires_grad_()
    loss, hits = cross_entropy_with_hits(x, target, **arguments)
    assert hits == right.sum() and not hits.requires_grad
    (grad,) = torch.autograd.grad(loss.sum(), x)
    expected = cross_entropy(x, target, **arguments)
    assert loss.dtype == expected.dtype and loss.equal(expected)
    assert grad.equal(torch.autograd.grad(expected.sum(), x)[0])


def check_hits(shape, dtype, device):
    input, target = make_case(shape, "ignore", dtype, device)
    class_dim = min(1, len(shape) - 1)
    right = input.argmax(class_dim)
    target = torch.where((target != IGNORED) & (target % 3 > 0), right, target)
    assert_hits(input, target)
    weight = class_weight(shape[class_dim], dtype, device)
    for reduction in REDUCTIONS:
        assert_hits(input, target, weight=weight, reduction=reduction, label_smoothing=0.1)
    ties = input.round().clamp(-1, 1)  # nearly every row has several greatest logits
    assert_hits(ties, torch.where(target % 2 == 0, ties.argmax(class_dim), target))


def check_hits_at_the_edges(device):
    def hits(rows, target):
        return cross_entropy_with_hits(
            torch.tensor(rows, device=device), torch.tensor(target, device=device)
        )[1]

    for C in (4, 40):
        pad = [-2.0] * (C - 4)
        assert hits([[1.0, 2.0, 2.0, 0.0, *pad]], [1]) == 1  # the first of equal ones
        assert hits([[1.0, 2.0, 2.0, 0.0, *pad]], [2]) == 0
        assert hits([[-INF, 1.0, -INF, -1.0, *pad]], [1]) == 1
        assert hits([[0.0, INF, 0.0, 0.0, *pad]], [1]) == 1
        assert hits([[-INF] * C], [0]) == 1
        assert hits([[NAN, 1.0, 0.0, 0.0, *pad]] * 9, [1] * 9) == 0
        assert hits([[0.0, 1.0, 0.0, NAN, *pad]] * 9, [1] * 9) == 0
        assert hits([[NAN] * C], [0]) == 0
        assert hits([[1.0, 0.0, 0.0, 0.0, *pad]] * 3, [0, IGNORED, 1]) == 1


def check_gradient_at_a_sure_target(C, device):
    # A softmax stored in half precision before 1 is subtracted would give exactly 0 here.
    logits = torch.full((1, C), -200.0)
    logits[0, :3] = torch.tensor([12.0, 0.0, 0.0])
    input = logits.to(device, torch.bfloat16).requires_grad_()
    loss = cross_entropy(input, torch.tensor([0], device=device))
    (grad,) = torch.autograd.grad(loss, input)
    exact = -2 * torch.exp(torch.tensor(-12.0)) / (1 + 2 * torch.exp(torch.tensor(-12.0)))
    torch.testing.assert_close(grad[0, 0].float().cpu(), exact, rtol=0.01, atol=0)
