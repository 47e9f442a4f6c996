"""cross_entropy against torch.nn.functional.cross_entropy in float64."""

import copy
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from emulator import build as emulator
from helpers import (
    LAYOUTS,
    assert_digests_do_not_depend_on_memory,
    assert_error_within_twice_native,
    digest,
    with_layout,
)

from fastcls import FusedCrossEntropyLoss, build_info, functional, reference
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


# ------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "ignore", "prob"])
@pytest.mark.parametrize("shape", [s for s, _ in SHAPES], ids=SHAPE_IDS)
def test_parity(device, shape, kind, reduction, dtype):
    input, target = make_case(shape, kind, dtype, device)
    C = shape[min(1, len(shape) - 1)]
    weights = [None, class_weight(C, dtype, device)]
    for weight, smoothing in itertools.product(weights, (0.0, 0.1)):
        assert_like_native(
            input,
            target,
            weight,
            what=f"weight={weight is not None} smoothing={smoothing}",
            reduction=reduction,
            label_smoothing=smoothing,
        )


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_index_dtypes(device, dtype):
    input, target = make_case((9, 10), "index", device=device)
    expected = value_and_grad(cross_entropy, input, target)
    torch.testing.assert_close(
        value_and_grad(cross_entropy, input, target.to(dtype)), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 255])
def test_ignore_index(device, ignore_index):
    input, target = make_case((40, 10), "index", device=device)
    target[::3] = ignore_index
    for weight, smoothing in itertools.product([None, class_weight(10, device=device)], [0.0, 0.2]):
        assert_like_native(
            input, target, weight, ignore_index=ignore_index, label_smoothing=smoothing
        )


def test_uint8_can_ignore_255(device):
    input, target = make_case((9, 10), "index", device=device)
    target[2] = 255
    expected = F.cross_entropy(input, target, ignore_index=255)
    torch.testing.assert_close(
        cross_entropy(input, target.to(torch.uint8), ignore_index=255), expected
    )


@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weight_with_half_logits(device, dtype, kind):
    input, target = make_case((9, 10), kind, dtype, device)
    weight = class_weight(10, device=device) + 0.01
    loss = cross_entropy(input, target, weight)
    expected = F.cross_entropy(input.float(), in_dtype(target, torch.float32), weight)
    assert loss.dtype == (dtype if kind == "index" else torch.float32)
    torch.testing.assert_close(loss, expected.to(loss.dtype))


@pytest.mark.parametrize("logits", DTYPES, ids=str)
@pytest.mark.parametrize("probabilities", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [None, *DTYPES], ids=str)
def test_probabilities_promote_as_in_pytorch(device, logits, probabilities, weight):
    input, target = make_case((6, 5), "prob", torch.float32, device)
    input, target = input.to(logits).requires_grad_(), target.to(probabilities)
    weight = None if weight is None else class_weight(5, weight, device)
    loss = cross_entropy(input, target, weight)
    assert loss.dtype == F.cross_entropy(input, target, weight).dtype
    double = None if weight is None else weight.double()
    exact = F.cross_entropy(input.double(), target.double(), double)
    torch.testing.assert_close(loss, exact.to(loss.dtype))
    (grad,) = torch.autograd.grad(loss, input)
    assert grad.dtype == logits


@pytest.mark.parametrize("kind", ["ignore", "prob"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(device, dtype, layout, kind):
    input, target = make_case((3, 5, 4, 6), kind, dtype, device)
    input = with_layout(input, layout)
    if kind == "prob":
        target = with_layout(target, "sliced")
    for reduction in REDUCTIONS:
        assert_like_native(input, target, what=layout, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("C", [10, 100])
@pytest.mark.parametrize("view", ["rows", "classes", "transposed", "expanded"])
def test_matrix_views(device, view, C):
    input, target = make_case((12, C), "index", device=device)
    bigger = torch.full((25, 2 * C + 1), NAN, device=device)
    if view == "rows":
        input = bigger[1::2, :C].copy_(input)
    elif view == "classes":
        input = bigger[:12, 1::2].copy_(input)
    elif view == "transposed":
        input = input.t().contiguous().t()
    else:
        input = input[:1].expand(12, C)
    assert_like_native(input, target, class_weight(C, device=device), what=view)


def test_strided_targets_and_weights(device):
    input, target = make_case((12, 10), "index", device=device)
    weight = class_weight(20, device=device)[::2]
    strided = torch.full((24,), 99, device=device)[::2].copy_(target)
    assert_like_native(input, strided, weight)


def test_permuted_maps_that_do_not_merge(device):
    input, _ = make_case((2, 3, 4, 5, 3), "index", device=device)
    target = torch.randint(4, (2, 3, 5, 3), generator=torch.Generator().manual_seed(1)).to(device)
    assert_like_native(input.permute(0, 2, 1, 4, 3), target.permute(0, 1, 3, 2), reduction="none")


def test_gradient_keeps_the_memory_format(device):
    input, target = make_case((2, 3, 4, 5), "index", device=device)
    input = with_layout(input, "channels_last")
    _, grad = value_and_grad(cross_entropy, input, target)
    assert grad.is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------- numbers at the edges


@pytest.mark.parametrize("C", [10, 100])
@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0, 1e4])
def test_shifted_logits_keep_their_digits(device, shift, C):
    input, target = make_case((33, C), "index", device=device, scale=10.0)
    assert_like_native(input + shift, target, what=f"shift {shift}", reduction="none")


@pytest.mark.parametrize("C", [10, 100])
@pytest.mark.parametrize("magnitude", [50.0, 200.0, 1e4, 3e38])
def test_large_logits(device, magnitude, C):
    input = torch.full((3, C), -magnitude / 2, device=device)
    input[:, 0], input[:, -1] = magnitude / 2, -magnitude / 2 + 1
    assert_like_native(input, torch.tensor([0, 1, C - 1], device=device), reduction="none")


# Rows whose exponentials overflow, vanish or lose digits unless the maximum is subtracted: factor
# and shift of the logits, the target's own logit.
FAR_ROWS = [
    (1, 59, None),
    (1, 70, None),
    (1, 1e4, None),
    (1, -45, None),
    (0.03, -87.5, None),
    (1, -1e4, None),
    (1, 0, -80),
    (1, 0, -100),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [2, 10, 16, 17, 100, 200, 300, 1001])
def test_one_row_among_others_is_far_from_zero(device, C, dtype):
    input, target = make_case((16 * len(FAR_ROWS) + 5, C), "index", scale=10.0)
    for row, (factor, shift, at_target) in zip(range(3, len(input), 16), FAR_ROWS, strict=False):
        input[row] = input[row] * factor + shift
        if at_target:
            input[row, target[row]] = at_target
    input, target = input.to(device, dtype), target.to(device)
    assert_like_native(input, target, class_weight(C, dtype, device), reduction="none")
    ours = value_and_grad(cross_entropy, input, target, reduction="none")
    exact = value_and_grad(reference.cross_entropy, input.double(), target, reduction="none")
    eps = torch.finfo(dtype).eps
    for mine, true in zip(ours, exact, strict=True):  # row by row: far rows hide errors of others
        torch.testing.assert_close(mine.double(), true, rtol=8 * eps, atol=2 * eps)


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


@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("C", [5, 40, 300])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("edge", EDGE_ROWS)
def test_infinite_and_nan_logits(device, edge, weighted, smoothing, C, rows):
    logits, target = EDGE_ROWS[edge]
    input = torch.tensor([logits + [0.5] * (C - 5)] * rows, device=device)
    weight = torch.ones(C, device=device) if weighted else None
    if weighted:
        weight[1] = 0.0  # 0 * -inf is NaN in PyTorch's loss, not in its gradient
    index = torch.full((rows,), target, device=device)
    prob = F.one_hot(index.clamp(min=0), C).float()
    for t in [index, prob] if target >= 0 else [index]:
        arguments = {"weight": weight, "label_smoothing": smoothing, "reduction": "none"}
        ours = value_and_grad(cross_entropy, input, t, **arguments)
        native = value_and_grad(reference.cross_entropy, input, t, **arguments)
        torch.testing.assert_close(ours, native, equal_nan=True, rtol=1e-5, atol=1e-7)


def test_ignored_rows_have_no_gradient_even_where_logits_are_nan(device):
    input = torch.full((3, 5), NAN, device=device)
    loss, grad = value_and_grad(
        cross_entropy, input, torch.full((3,), IGNORED, device=device), reduction="sum"
    )
    assert loss == 0 and (grad == 0).all()


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


@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("shape", EMPTY_SHAPES)
def test_empty(device, shape, kind):
    check_empty(shape, kind, device)


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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES_FOR_MEANS)
def test_mean_over_nothing_is_nan(device, shape, dtype, smoothing):
    check_mean_over_nothing(shape, dtype, smoothing, device)


def check_mean_over_one_row_without_weight(classes, smoothing, device):
    """0 / 0 for the row that is not ignored, 0 for those that are."""
    input, target = torch.randn(40, classes, device=device), torch.full((40,), IGNORED)
    target[3] = 1
    arguments = {"weight": torch.zeros(classes, device=device), "label_smoothing": smoothing}
    loss, grad = value_and_grad(cross_entropy, input, target.to(device), **arguments)
    assert loss.isnan() and grad[3].isnan().all()
    assert (grad[target == IGNORED] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 10, 24, 300])
def test_mean_over_one_row_without_weight(device, classes, smoothing):
    check_mean_over_one_row_without_weight(classes, smoothing, device)


@pytest.mark.parametrize("smoothing", [-0.5, NAN, 1.0])
def test_extreme_smoothing(device, smoothing):
    input, target = make_case((4, 5), "index", device=device)
    expected = F.cross_entropy(input, target, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(input, target, label_smoothing=smoothing), expected)


# ------------------------------------------------------------------------------- top-1 hits


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s, _ in SHAPES], ids=SHAPE_IDS)
def test_hits(device, shape, dtype):
    check_hits(shape, dtype, device)


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


def test_hits_at_the_edges(device):
    check_hits_at_the_edges(device)


def test_hits_need_class_indices(device):
    input, target = make_case((3, 5), "prob", device=device)
    for t in (target, target.detach().requires_grad_()):
        with pytest.raises(RuntimeError, match="class indices where hits are counted"):
            cross_entropy_with_hits(input, t)
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    loss, hits = cross_entropy_with_hits(input[:0], nothing)
    assert loss.isnan() and hits == 0


def test_no_gradient_of_a_weight_beside_class_indices(device):
    input, target = make_case((3, 5), "index", device=device)
    weight = class_weight(5, device=device).requires_grad_()
    for loss in (cross_entropy, cross_entropy_with_hits, F.cross_entropy):
        with pytest.raises(RuntimeError, match=r"weight.* gradient|'weight'.*requires_grad"):
            loss(input, target, weight)


@pytest.mark.parametrize("grad", [False, True])
def test_hits_compile(device, grad):
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy_with_hits, fullgraph=True, backend="inductor")
    input, target = make_case((6, 5), "index", device=device)
    input.requires_grad_(grad)
    torch.testing.assert_close(compiled(input, target), cross_entropy_with_hits(input, target))


# ------------------------------------------------------------------ defects seen elsewhere


def test_bfloat16_loss_has_float32_inside(device):
    input, target = make_case((512, 10), "index", torch.bfloat16, device)
    with torch.autocast(input.device.type, torch.bfloat16):
        loss = cross_entropy(input, target)
    exact = F.cross_entropy(input.double(), target)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - exact) < 1e-6 * exact


def check_gradient_at_a_sure_target(C, device):
    # A softmax stored in half precision before 1 is subtracted would give exactly 0 here.
    logits = torch.full((1, C), -200.0)
    logits[0, :3] = torch.tensor([12.0, 0.0, 0.0])
    input = logits.to(device, torch.bfloat16).requires_grad_()
    loss = cross_entropy(input, torch.tensor([0], device=device))
    (grad,) = torch.autograd.grad(loss, input)
    exact = -2 * torch.exp(torch.tensor(-12.0)) / (1 + 2 * torch.exp(torch.tensor(-12.0)))
    torch.testing.assert_close(grad[0, 0].float().cpu(), exact, rtol=0.01, atol=0)


def test_half_gradient_at_the_target_is_not_rounded_twice(device):
    check_gradient_at_a_sure_target(3, device)


def test_nothing_of_the_caller_is_overwritten(device):
    for kind, dtype in itertools.product(["ignore", "prob"], DTYPES):
        input, target = make_case((21, 10), kind, dtype, device)
        weight = class_weight(10, dtype, device)
        before = [t.clone() for t in (input, target, weight)]
        x = input.requires_grad_()
        loss = cross_entropy(x, target, weight, label_smoothing=0.1)
        grad_loss = torch.full_like(loss, 3.0)
        first = torch.autograd.grad(loss, x, grad_loss, retain_graph=True)[0]
        kept = first.clone()
        second = torch.autograd.grad(loss, x, grad_loss)[0]
        assert (first == kept).all() and (second == kept).all()
        assert first.data_ptr() != second.data_ptr()
        for t, old in zip((input, target, weight), before, strict=True):
            assert (t == old).all()
        assert (grad_loss == 3.0).all()


def test_gradients_accumulate_over_two_backward_passes(device):
    input, target = make_case((21, 10), "index", device=device)
    input.requires_grad_()
    loss = cross_entropy(input, target)
    for _ in range(3):
        loss.backward(retain_graph=True)
    (once,) = torch.autograd.grad(F.cross_entropy(input, target), input)
    torch.testing.assert_close(input.grad, 3 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_may_change_after_the_loss(dtype):
    """As with PyTorch's own loss: on the CPU the backward pass does not read them again."""
    input, target = make_case((21, 10), "index", dtype)
    expected = value_and_grad(cross_entropy, input, target)[1]
    logits = input.clone().requires_grad_()
    changed = logits * 1
    loss = cross_entropy(changed, target)
    changed.zero_()
    grad_loss = torch.full_like(loss, 0.5)  # what value_and_grad gives a single loss
    assert torch.autograd.grad(loss, logits, grad_loss)[0].equal(expected)


def test_small_gradients_survive_in_float16(device):
    # They are smaller than the smallest float16 until the loss scale multiplies them.
    input = torch.zeros(512, 10, dtype=torch.float16, device=device)
    input[:, 0] = 11.0
    target = torch.zeros(512, dtype=torch.int64, device=device)
    scale = 65536.0
    x, wide = input.clone().requires_grad_(), input.float().requires_grad_()
    with torch.autocast(input.device.type, torch.float16):
        loss = cross_entropy(x, target)
    (grad,) = torch.autograd.grad(loss * scale, x)
    (expected,) = torch.autograd.grad(F.cross_entropy(wide, target) * scale, wide)
    assert expected.abs().max() / scale < torch.finfo(torch.float16).smallest_normal
    torch.testing.assert_close(grad.float(), expected, rtol=2e-3, atol=0)


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


@pytest.mark.parametrize("scale", [INF, NAN, 0.0, 65536.0])
def test_loss_scales_pass_through(device, scale):
    for C in (10, 100):
        input, target = make_case((9, C), "ignore", device=device)
        input.requires_grad_()
        losses = (function(input, target) for function in (cross_entropy, reference.cross_entropy))
        ours, native = (torch.autograd.grad(loss * scale, input)[0] for loss in losses)
        # inf - inf at the target is NaN in PyTorch; ours is inf: both are found by GradScaler.
        assert (ours.isfinite() == native.isfinite()).all()
        finite = native.isfinite()
        torch.testing.assert_close(ours[finite], native[finite], rtol=1e-5, atol=0)


def test_offsets_past_two_to_the_31st(device):
    # Two rows more than 2^31 elements apart, in one allocation that is never touched between them.
    C, distance = 4, 2**31 + 8
    storage = torch.empty(distance + C, dtype=torch.bfloat16, device=device)
    input = storage.as_strided((2, C), (distance, 1))
    small, target = make_case((2, C), "index", torch.bfloat16, device)
    input.copy_(small)
    assert cross_entropy(input, target) == cross_entropy(small, target)


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


# ------------------------------------------------------------ past the dispatcher (CPU)

plain_call = functional._plain_cross_entropy
needs_plain_call = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="this torch has no DLPack exchange table",
)


@needs_plain_call
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (20, 10), (300, 10), (40, 100), (3, 5003)])
def test_plain_call_gives_what_the_op_gives(shape, dtype, reduction):
    input, target = make_case(shape, "ignore", dtype)
    code = functional._REDUCTIONS[reduction]
    for smoothing, active in itertools.product((0.0, 0.1), (False, True)):
        settings = (IGNORED, code, smoothing)
        with torch.autocast("cpu", torch.bfloat16, enabled=active):
            loss, grad = plain_call(input.detach().requires_grad_(), target, *settings)
            alone, nothing = plain_call(input, target, *settings)
        wide = active and dtype == torch.bfloat16
        expected = torch.ops.fastcls.cross_entropy_forward(
            input, target, None, *settings, wide, functional._SAVE_GRAD, False
        )
        assert nothing is None and alone.equal(loss)
        assert loss.dtype == expected[0].dtype and loss.equal(expected[0])
        assert grad.dtype == dtype and grad.equal(expected[1])


NOT_PLAIN = {
    "float64": lambda x, y: (x.double(), y),
    "float16": lambda x, y: (x.half(), y),
    "int32 classes": lambda x, y: (x, y.int()),
    "probabilities": lambda x, y: (x, x.softmax(1)),
    "strided logits": lambda x, y: (x.t().contiguous().t(), y),
    "strided classes": lambda x, y: (x, y.repeat_interleave(2)[::2]),
    "broadcast logits": lambda x, y: (x[:1].expand(9, 10), y),
    "negated view": lambda x, y: (torch._neg_view(x), y),
    "maps": lambda x, y: (x[:, :, None], y[:, None]),
    "no batch": lambda x, y: (x[0], y[0]),
    "no rows": lambda x, y: (x[:0], y[:0]),
    "other batch": lambda x, y: (x, y[:4]),
    "out of range": lambda x, y: (x, y + 5),
    "parameter": lambda x, y: (torch.nn.Parameter(x), y),
    "meta": lambda x, y: (x.to("meta"), y.to("meta")),
    "numpy": lambda x, y: (x.numpy(), y),
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_plain_call_leaves_the_rest_to_the_op(what):
    input, target = make_case((9, 10), "index")
    target[0] = 9
    assert plain_call(*NOT_PLAIN[what](input, target), IGNORED, 1, 0.0) is None


@pytest.mark.parametrize(
    "settings", [(2**70, 1, 0.0), (IGNORED, 0, 0.0), (IGNORED, 1, 1.5), (0, 1, 0)]
)
def test_plain_call_leaves_odd_settings_to_the_op(settings):
    assert plain_call(*make_case((9, 10), "index"), *settings) is None


@pytest.mark.parametrize(
    "watcher", ["mode", "function_mode", "profiler", "forward_ad", "trace", "functorch"]
)
def test_plain_call_hides_nothing(watcher):
    input, target = make_case((9, 10), "index")
    calls = []

    def call(x):
        calls.append(plain_call(x, target, IGNORED, 1, 0.0))
        return x.sum()

    if watcher == "mode":
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            call(input)
    elif watcher == "function_mode":
        with torch.overrides.BaseTorchFunctionMode():
            call(input)
    elif watcher == "profiler":
        with torch.profiler.profile() as profile:
            call(input)
            cross_entropy(input, target)
        assert "fastcls::cross_entropy_forward" in [event.key for event in profile.key_averages()]
    elif watcher == "forward_ad":
        with torch.autograd.forward_ad.dual_level():
            call(input)
    elif watcher == "trace":
        torch.jit.trace(call, (input,), check_trace=False)
    else:
        torch.func.grad(call)(input)
    assert calls and all(result is None for result in calls)


@needs_plain_call
def test_is_one():
    one = torch.tensor(1.0)
    assert functional._is_one(one) and functional._is_one(one.clone())
    others = [
        torch.tensor(2.0),
        one.double(),
        one.bfloat16(),
        one[None],
        torch._neg_view(one),
        None,
    ]
    assert not any(functional._is_one(other) for other in others)


# ------------------------------------------------------------ instruction sets and tail lengths

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
        "import test_cross_entropy as tests; "
        "torch.save([tests.tail_results(dtype) for dtype in tests.FAST_DTYPES], sys.argv[1])"
    )
    here = Path(__file__).parent  # not the root, whose fastcls/ would hide the installed one
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
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


# ------------------------------------------------------------------------- PyTorch's systems


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
def test_torch_func(device, transform):
    input, target = make_case((6, 5), "index", device=device)
    ours, native = (
        TRANSFORMS[transform](lambda x, f=f: f(x, target), input)
        for f in (cross_entropy, F.cross_entropy)
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
        ours, native = (
            transform(loss)(inputs, targets) for loss in (cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(ours, native)


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


# ------------------------------------------------------------------------------- errors

X, Y, P = torch.zeros(4, 5), torch.arange(4), torch.full((4, 5), 0.2)


def error(exception, message, *args, **kwargs):
    return pytest.param(exception, message, args, kwargs, id=message)


@pytest.mark.parametrize(
    "exception, message, args, kwargs",
    [
        error(TypeError, "input must be a Tensor, got list", [[1.0]], Y),
        error(TypeError, "target must be a Tensor, got list", X, [0, 1, 2, 3]),
        error(TypeError, "weight must be a Tensor, got list", X, Y, [1.0] * 5),
        error(
            ValueError,
            'reduction must be "none", "mean" or "sum", got \'avg\'',
            X,
            Y,
            reduction="avg",
        ),
        error(
            ValueError, 'reduction must be "none", "mean" or "sum", got None', X, Y, reduction=None
        ),
        error(
            ValueError, 'reduction must be "none", "mean" or "sum", got [1]', X, Y, reduction=[1]
        ),
        error(
            RuntimeError,
            "label_smoothing must be between 0.0 and 1.0, got 1.5",
            X,
            Y,
            label_smoothing=1.5,
        ),
        error(TypeError, "label_smoothing must be a float, got None", X, Y, label_smoothing=None),
        error(TypeError, "ignore_index must be an int, got 1.5", X, Y, ignore_index=1.5),
        error(TypeError, "ignore_index must be an int, got None", X, P, ignore_index=None),
        error(
            RuntimeError,
            "input must be float32, float64, bfloat16 or float16, got Long",
            X.long(),
            Y,
        ),
        pytest.param(
            RuntimeError,
            "input must be float32, float64, bfloat16 or float16, got Long",
            (X.long(), P),
            {},
            id="integers with probabilities",
        ),
        error(
            RuntimeError,
            "input must be float32, float64, bfloat16 or float16, got ComplexFloat",
            X.to(torch.complex64),
            Y,
        ),
        error(
            RuntimeError,
            "input must have shape (C), (N, C) or (N, C, d1, ...), got ()",
            X[0, 0],
            Y[0],
        ),
        error(ValueError, "target must have batch size 4 like input, got (3,)", X, Y[:3]),
        error(ValueError, "target must have batch size 4 like input, got ()", X, Y[0]),
        error(
            ValueError,
            "target must have batch size 1, shape () or (1,), with a 1D input, got (2,)",
            X[0],
            Y[:2],
        ),
        error(
            RuntimeError,
            "target must have shape (4,) (class indices) or (4, 5) (class "
            "probabilities), got (4, 1)",
            X,
            Y[:, None],
        ),
        error(
            RuntimeError,
            "target must have shape (4, 3) (class indices) or (4, 5, 3) (class "
            "probabilities), got (4, 2)",
            torch.zeros(4, 5, 3),
            torch.zeros(4, 2).long(),
        ),
        error(
            RuntimeError,
            "target must have shape (4,) (class indices) or (4, 5) (class "
            "probabilities), got (4, 4)",
            X,
            torch.rand(4, 4),
        ),
        error(
            RuntimeError,
            "target must have an integer dtype (class indices of shape (4,)), got Bool",
            X,
            Y.bool(),
        ),
        error(
            RuntimeError,
            "target must have an integer dtype (class indices of shape (4,)), got Float",
            X,
            Y.float(),
        ),
        error(
            RuntimeError,
            "target must have a floating point dtype (class probabilities, as it "
            "has input's shape (4, 5)), got Long",
            X,
            P.long(),
        ),
        error(
            RuntimeError,
            "ignore_index must be negative (unused) with class probabilities, got 2",
            X,
            P,
            ignore_index=2,
        ),
        error(
            RuntimeError,
            "weight must have shape (5,), one value per class, got (4,)",
            X,
            Y,
            torch.ones(4),
        ),
        error(
            RuntimeError,
            "weight must have shape (5,), one value per class, got (1, 5)",
            X,
            P,
            torch.ones(1, 5),
        ),
        error(
            RuntimeError,
            "weight must be Float like input, got Double",
            X,
            Y,
            torch.ones(5).double(),
        ),
        error(
            RuntimeError,
            "weight must be Half like input or Float, got BFloat16",
            X.half(),
            Y,
            torch.ones(5).bfloat16(),
        ),
        error(
            IndexError,
            "target must be in [0, 5) or ignore_index, got 5 in row 2",
            X,
            torch.tensor([0, 1, 5, 7]),
        ),
        error(
            IndexError,
            "target must be in [0, 5) or ignore_index, got -1 in row 1",
            X,
            torch.tensor([0, -1, 2, 3]),
            label_smoothing=0.1,
        ),
        error(
            IndexError,
            "target must be in [0, 5) or ignore_index, got 255 in row 0",
            X,
            torch.tensor([255, 0, 0, 0], dtype=torch.uint8),
            torch.ones(5),
        ),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_errors(exception, message, args, kwargs, grad):
    input, *others = args
    if grad and isinstance(input, torch.Tensor) and input.is_floating_point():
        input = input.detach().requires_grad_()
    with pytest.raises(exception) as raised:
        cross_entropy(input, *others, **kwargs)
    assert str(raised.value) == f"cross_entropy: {message}"
    native = F.cross_entropy
    with pytest.raises(exception):  # PyTorch's own exception for the same call
        native(input, *others, **kwargs)


@pytest.mark.parametrize("name", ["target", "weight"])
def test_device_mix(name):
    tensors = {"input": X, "target": Y, "weight": torch.ones(5)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of input"):
        cross_entropy(**tensors)


# ------------------------------------------------- CUDA kernels, on the host where there is no GPU


@pytest.fixture(params=["emulated", "cuda"])
def cuda_kernels(request, monkeypatch):
    """Device whose tensors `cross_entropy` sends to the CUDA kernels."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        return torch.device("cuda")
    monkeypatch.setattr(functional, "_ops", emulator.load())
    monkeypatch.setattr(functional, "_plain_cross_entropy", lambda *_: None)
    monkeypatch.setattr(functional, "_on_cuda", lambda input: True)
    return torch.device("cpu")


@pytest.fixture(params=["rows", "gradient"])
def saved(request, monkeypatch):
    """What the forward pass saves on CUDA, whatever the size, where it has the choice."""
    monkeypatch.setattr(functional, "_ONE_READ_BYTES", 0 if request.param == "gradient" else 2**60)
    return request.param


CUDA_SHAPES = [
    ((37, 10), "few classes: a thread to a row, a rest of a block"),
    ((130, 3), "few classes in several blocks, odd rows"),
    ((5, 32), "the most classes of a thread"),
    ((3, 33), "one warp to a row, fewer vectors than lanes, rows that start anywhere"),
    ((13, 100), "several warps in a block"),
    ((4, 513), "vectors, and single elements at both ends"),
    ((2, 2500), "128 threads to a row"),
    ((2, 4101), "256 threads to a row in bfloat16, 512 in float32"),
    ((2, 9001), "512 threads in bfloat16; in float32 with vectors in shared memory"),
    ((2, 17003), "shared memory in bfloat16 too"),
    ((2, 7, 9), "classes strided: the plain kernels"),
    ((3, 1, 40), "rows of one class that the layout calls strided"),
]
LONG_SHAPES = [
    ((2, 16384), "float32: 48 KiB of vectors in shared memory, and the kernel's own arrays"),
    ((2, 41003), "float32: more than 1024 threads keep, the rest of the row is read again"),
    ((2, 75003), "the same in bfloat16"),
]


def check_cuda_kernels(shape, kind, dtype, device):
    input, target = make_case(shape, kind, dtype, device)
    for reduction, smoothing, weighted in [
        ("none", 0.0, True),
        ("mean", 0.1, True),
        ("mean", 0.1, False),
        ("mean", 0.0, False),
        ("mean", 0.0, True),
        ("sum", 0.1, False),
    ]:
        weight = class_weight(shape[1], dtype, device) if weighted else None
        what = f"{reduction} {smoothing} {weighted}"
        arguments = {"reduction": reduction, "label_smoothing": smoothing}
        assert_like_native(input, target, weight, what, **arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["ignore", "prob"])
@pytest.mark.parametrize("shape", [s for s, _ in CUDA_SHAPES], ids=str)
def test_cuda_kernels(cuda_kernels, saved, shape, kind, dtype):
    if saved == "gradient" and (kind == "prob" or dtype in (torch.float16, torch.float64)):
        pytest.skip("saves rows all the same")
    check_cuda_kernels(shape, kind, dtype, cuda_kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [s for s, _ in LONG_SHAPES], ids=str)
def test_cuda_kernels_of_long_rows(cuda_kernels, saved, shape, dtype):
    check_cuda_kernels(shape, "ignore", dtype, cuda_kernels)


@pytest.mark.parametrize("shape", [(262150, 2), (8201, 33), (2050, 1040), (4100, 2101)], ids=str)
def test_cuda_kernels_with_several_turns_to_a_block(cuda_kernels, saved, shape):
    """More rows than there may be blocks, and more than one block to count the targets."""
    input, target = make_case(shape, "ignore", torch.bfloat16, cuda_kernels)
    assert_like_native(input, target)
    assert_hits(input, target, weight=class_weight(shape[1], torch.bfloat16, cuda_kernels))


def misaligned(input, start, row):
    """The same logits, their rows `row` elements apart, the first one `start` elements off."""
    rows, C = input.shape
    storage = torch.full((start + rows * row + 8,), NAN, dtype=input.dtype, device=input.device)
    return storage.as_strided((rows, C), (row, 1), start).copy_(input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cuda_kernels_tails(cuda_kernels, saved, smoothing, dtype):
    """Every length modulo a vector, from every start within one."""
    arguments = {"label_smoothing": smoothing, "reduction": "mean"}
    for C in [*range(1, 18), 31, *range(32, 50), *range(253, 262)]:
        input, target = make_case((5, C), "ignore", dtype, cuda_kernels, seed=C)
        expected = value_and_grad(cross_entropy, input, target, **arguments)
        assert_like_native(input, target, what=f"{C}", **arguments)
        for start, row in [(1, C), (2, C + 1), (4, C + 4), (7, C + 8), (8, C + 16)]:
            x = misaligned(input, start, row)
            ours = value_and_grad(cross_entropy, x, target, **arguments)
            for mine, theirs in zip(ours, expected, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("scale", [INF, NAN, 0.0, 0.3, 65536.0])
@pytest.mark.parametrize("C", [10, 100, 4101])
def test_cuda_kernels_loss_scales(cuda_kernels, saved, C, scale):
    input, target = make_case((9, C), "ignore", device=cuda_kernels)
    input.requires_grad_()
    losses = [function(input, target) for function in (cross_entropy, reference.cross_entropy)]
    ours, native = (torch.autograd.grad(loss * scale, input)[0] for loss in losses)
    assert (ours[target == IGNORED] == 0).all()
    assert (ours.isfinite() == native.isfinite()).all()
    finite = native.isfinite()
    torch.testing.assert_close(
        ours[finite], native[finite], rtol=1e-4, atol=1e-8 if scale < 1 else 0
    )


@pytest.mark.parametrize("C", [10, 100])
def test_cuda_kernels_backward_twice(cuda_kernels, saved, C):
    input, target = make_case((21, C), "ignore", device=cuda_kernels)
    x = input.clone().requires_grad_()
    loss = cross_entropy(x, target)
    first = torch.autograd.grad(loss * 3, x, retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss * 3, x)[0]
    assert first.equal(kept) and second.equal(kept) and first.data_ptr() != second.data_ptr()
    assert x.equal(input)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_in_place(cuda_kernels, dtype, layout):
    """The op that the backward pass calls, on CUDA's kernels and on the CPU's."""
    grad, target = make_case((3, 5, 4, 6), "ignore", dtype)
    grad = with_layout(grad, layout)
    for scale in (1.0, 0.25, INF):
        expected = torch.where((target == IGNORED).unsqueeze(1), grad, grad * scale)
        for ops, device in ((torch.ops.fastcls, "cpu"), (functional._ops, cuda_kernels)):
            scaled = torch.empty_like(grad, device=device).copy_(grad)
            factor = torch.tensor(scale, dtype=dtype, device=device)
            ops.cross_entropy_scale_(scaled, factor, target.to(device), IGNORED)
            torch.testing.assert_close(scaled.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_scale_in_place_checks_its_arguments():
    scale = torch.ops.fastcls.cross_entropy_scale_
    grad, target = make_case((3, 5), "index")
    one = torch.tensor(1.0)
    for arguments, message in [
        ((grad, one[None], target), r"grad_loss must have shape \(\)"),
        ((grad, one.double(), target), "grad_loss must be Float like grad"),
        ((grad, one, target[:2]), "target must have batch size 3"),
        ((grad, one, grad), "target must hold class indices"),
    ]:
        with pytest.raises(RuntimeError, match=f"cross_entropy_scale_: {message}"):
            scale(*arguments, IGNORED)
    torch.library.opcheck(torch.ops.fastcls.cross_entropy_scale_.default, (grad, one, target, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_saved_on_cuda(monkeypatch, dtype):
    """The gradient only where one read of the logits serves, and rows in every other case."""
    monkeypatch.setattr(functional, "_on_cuda", lambda input: True)
    monkeypatch.setattr(functional, "_ONE_READ_BYTES", 3 * 100 * dtype.itemsize)
    input, target = make_case((3, 100), "index", dtype)
    weight = class_weight(100, dtype)

    def saved(input, target=target, weight=None, reduction=1, smoothing=0.0):
        settings = (IGNORED, reduction, smoothing)
        return functional._save_of(input, target, weight, settings)

    served = dtype in (torch.float32, torch.bfloat16)
    assert saved(input) == (functional._SAVE_GRAD if served else functional._SAVE_ROWS)
    assert saved(input, weight=weight) == saved(input, smoothing=0.1) == saved(input)
    rows = [
        saved(input[:2]),
        saved(input, reduction=0),
        saved(input, input.softmax(1)),
        saved(input, weight=weight, smoothing=0.1),
        saved(input.t().contiguous().t()),
        saved(torch.zeros(60, 20, dtype=dtype)),
        saved(torch.zeros(300, dtype=dtype)),
    ]
    assert set(rows) == {functional._SAVE_ROWS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_kernels_layouts(cuda_kernels, layout):
    for kind in ("ignore", "prob"):
        input, target = make_case((2, 5, 3, 4), kind, device=cuda_kernels)
        input = with_layout(input, layout)
        target = with_layout(target, "sliced") if kind == "prob" else target
        assert_like_native(input, target, class_weight(5, device=cuda_kernels), layout)


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_cuda_kernels_index_dtypes(cuda_kernels, dtype):
    input, target = make_case((9, 10), "index", device=cuda_kernels)
    assert cross_entropy(input, target.to(dtype)) == cross_entropy(input, target)


@pytest.mark.parametrize("edge", EDGE_ROWS)
@pytest.mark.parametrize("C", [5, 40])
def test_cuda_kernels_infinite_and_nan_logits(cuda_kernels, saved, C, edge):
    logits, target = EDGE_ROWS[edge]
    input = torch.tensor([logits + [0.5] * (C - 5)] * 2, device=cuda_kernels)
    index = torch.full((2,), target, device=cuda_kernels)
    for smoothing, reduction in itertools.product((0.0, 0.1), ("none", "sum")):
        arguments = {"label_smoothing": smoothing, "reduction": reduction}
        ours = value_and_grad(cross_entropy, input, index, **arguments)
        native = value_and_grad(reference.cross_entropy, input, index, **arguments)
        torch.testing.assert_close(ours, native, equal_nan=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [s for s, _ in CUDA_SHAPES], ids=str)
def test_cuda_kernels_hits(cuda_kernels, shape, dtype):
    check_hits(shape, dtype, cuda_kernels)


def test_cuda_kernels_hits_at_the_edges(cuda_kernels):
    check_hits_at_the_edges(cuda_kernels)


@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("shape", EMPTY_SHAPES)
def test_cuda_kernels_empty(cuda_kernels, shape, kind):
    check_empty(shape, kind, cuda_kernels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES_FOR_MEANS)
def test_cuda_kernels_mean_over_nothing(cuda_kernels, saved, shape, smoothing):
    check_mean_over_nothing(shape, torch.float32, smoothing, cuda_kernels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 10, 24, 300])
def test_cuda_kernels_mean_over_one_row_without_weight(cuda_kernels, saved, classes, smoothing):
    check_mean_over_one_row_without_weight(classes, smoothing, cuda_kernels)


@pytest.mark.parametrize("kind", ["ignore", "prob"])
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (4, 6), (4, 6, 3), (300, 40)], ids=str)
def test_all_that_is_saved_is_written(cuda_kernels, shape, kind):
    """The mean's divisor too, where nobody divides: who compares outputs sees all of them.

    The emulator fills new tensors with NaN, which are no results here except where a mean has none.
    """
    if kind == "prob":
        target = torch.full(shape, 0.5, device=cuda_kernels)
    else:
        target = torch.full(batch_shape(shape), IGNORED, device=cuda_kernels)
        target[1:] = min(shape[1], 1)
    input = torch.zeros(shape, device=cuda_kernels)
    for reduction in (0, 1, 2):
        arguments = (input, target, None, IGNORED, reduction, 0.0, False, 1, False)
        saved = functional._ops.cross_entropy_forward(*arguments)[1]
        written = saved[:-1] if reduction == 1 and 0 in shape else saved
        assert not written.isnan().any()


@pytest.mark.parametrize("C", [3, 100, 4101])
def test_cuda_kernels_gradient_at_a_sure_target(cuda_kernels, saved, C):
    check_gradient_at_a_sure_target(C, cuda_kernels)


def test_cuda_kernels_add_long_strided_rows_up_without_losing_digits(cuda_kernels):
    """There one thread adds up all classes of a row."""
    input, target = make_case((2, 5000), "index", device=cuda_kernels, scale=1.0)
    strided = input.t().contiguous().t()
    _, grad = value_and_grad(cross_entropy, strided, target, reduction="sum")
    _, exact = value_and_grad(F.cross_entropy, input.double(), target, reduction="sum")
    torch.testing.assert_close(grad.double(), exact, rtol=1.5e-6, atol=0)


@pytest.mark.parametrize("C", [10, 101])
@pytest.mark.parametrize("outside", [-1, 101, 2**40])
def test_out_of_range_target_on_cuda_is_nan(cuda_kernels, saved, outside, C):
    input, target = make_case((9, C), "index", device=cuda_kernels)
    target[3] = outside
    loss, grad = value_and_grad(cross_entropy, input, target, reduction="none")
    assert loss[3].isnan() and loss.isnan().sum() == 1
    assert grad[3].isnan().all() and grad.isnan().sum() == C
    loss, grad = value_and_grad(cross_entropy, input, target)
    assert loss.isnan()
    assert grad[3].isnan().all() and grad.isnan().sum() == C
