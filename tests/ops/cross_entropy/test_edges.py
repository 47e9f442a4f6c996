"""cross_entropy where numbers run out, rows are missing or others go wrong."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_problems import (
    DTYPES,
    EDGE_ROWS,
    EMPTY_SHAPES,
    IGNORED,
    INF,
    NAN,
    SHAPES_FOR_MEANS,
    assert_like_native,
    check_empty,
    check_gradient_at_a_sure_target,
    check_mean_over_nothing,
    check_mean_over_one_row_without_weight,
    class_weight,
    make_case,
    value_and_grad,
    with_strided_classes,
)
from helpers import assert_same

from fastcls import reference
from fastcls.functional import cross_entropy


@pytest.mark.parametrize("C", [10, 100])
@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0, 1e4])
def test_shifted_logits_keep_their_digits(device, shift, C):
    input, target = make_case((33, C), "index", device=device, scale=10.0)
    assert_like_native(input + shift, target, what=f"shift {shift}", reduction="none")


@pytest.mark.parametrize("C", [2, 10, 100, 300])
def test_every_exponential_keeps_its_digits(device, C):
    """Of two classes that differ by up to 20, at every fraction of the powers of two between."""
    difference = torch.linspace(0, 20, 1500, device=device)
    input = torch.full((len(difference), C), -INF, device=device)
    input[:, 0], input[:, -1] = 0, -difference
    target = torch.zeros(len(difference), dtype=torch.int64, device=device)
    input.requires_grad_()
    (grad,) = torch.autograd.grad(cross_entropy(input, target, reduction="sum"), input)
    exact = torch.sigmoid(-difference.double())
    torch.testing.assert_close(grad[:, -1].double(), exact, rtol=7e-7, atol=0)


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


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [2, 10, 16, 17, 100, 200, 300, 1001])
def test_one_row_among_others_is_far_from_zero(device, C, dtype, strided):
    input, target = make_case((16 * len(FAR_ROWS) + 5, C), "index", scale=10.0)
    for row, (factor, shift, at_target) in zip(range(3, len(input), 16), FAR_ROWS, strict=False):
        input[row] = input[row] * factor + shift
        if at_target:
            input[row, target[row]] = at_target
    input, target = input.to(device, dtype), target.to(device)
    if strided:
        input = with_strided_classes(input)
    assert_like_native(input, target, class_weight(C, dtype, device), reduction="none")
    ours = value_and_grad(cross_entropy, input, target, reduction="none")
    exact = value_and_grad(reference.cross_entropy, input.double(), target, reduction="none")
    eps = torch.finfo(dtype).eps
    for mine, true in zip(ours, exact, strict=True):  # row by row: far rows hide errors of others
        torch.testing.assert_close(mine.double(), true, rtol=8 * eps, atol=2 * eps)


def test_one_class_costs_nothing(device):
    input = torch.randn(40, 1, device=device) * 10
    index = torch.zeros(40, dtype=torch.int64, device=device)
    for reduction in ("none", "sum"):
        loss, grad = value_and_grad(cross_entropy, input, index, reduction=reduction)
        assert (loss == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("C", [2, 10, 21, 300, 1000])
@pytest.mark.parametrize("logit, size", [(54, 1e-20), (0, 2e-38), (-40, 1e25)])
def test_weights_far_from_one(device, logit, size, C, strided, reduction):
    """Their products with exp(-x) would be below the smallest number, or infinite."""
    input, target = make_case((40, C), "index", device=device, scale=0.3)
    input += logit
    if strided:
        input = with_strided_classes(input)
    weight = class_weight(C, device=device) * size
    arguments = {"weight": weight, "reduction": reduction}
    _, grad = value_and_grad(cross_entropy, input, target, **arguments)
    arguments["weight"] = weight.double()
    _, exact = value_and_grad(F.cross_entropy, input.double(), target, **arguments)
    # atol: some of the smallest steps that float32 has
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-44)


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
        native = value_and_grad(reference.cross_entropy, input, t, **arguments)
        for x in (input, with_strided_classes(input)):
            ours = value_and_grad(cross_entropy, x, t, **arguments)
            torch.testing.assert_close(ours, native, equal_nan=True, rtol=1e-5, atol=1e-7)


def test_ignored_rows_have_no_gradient_even_where_logits_are_nan(device):
    input = torch.full((3, 5), NAN, device=device)
    loss, grad = value_and_grad(
        cross_entropy, input, torch.full((3,), IGNORED, device=device), reduction="sum"
    )
    assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("shape", EMPTY_SHAPES)
def test_empty(device, shape, kind):
    check_empty(shape, kind, device)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES_FOR_MEANS)
def test_mean_over_nothing_is_nan(device, shape, dtype, smoothing):
    check_mean_over_nothing(shape, dtype, smoothing, device)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [2, 10, 24, 300])
def test_mean_over_one_row_without_weight(device, classes, smoothing):
    check_mean_over_one_row_without_weight(classes, smoothing, device)


@pytest.mark.parametrize("smoothing", [-0.5, NAN, 1.0])
def test_extreme_smoothing(device, smoothing):
    input, target = make_case((4, 5), "index", device=device)
    expected = F.cross_entropy(input, target, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(input, target, label_smoothing=smoothing), expected)


def test_bfloat16_loss_has_float32_inside(device):
    input, target = make_case((512, 10), "index", torch.bfloat16, device)
    with torch.autocast(input.device.type, torch.bfloat16):
        loss = cross_entropy(input, target)
    exact = F.cross_entropy(input.double(), target)
    assert loss.dtype == torch.float32
    assert abs(loss.double() - exact) < 1e-6 * exact


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


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_may_change_after_the_loss(dtype, reduction):
    """As with PyTorch's own loss: on the CPU the backward pass does not read them again."""
    input, target = make_case((21, 10), "index", dtype)
    grads = []
    for change in (False, True):
        logits = input.clone().requires_grad_()
        changed = logits * 1
        loss = cross_entropy(changed, target, reduction=reduction)
        if change:
            changed.zero_()
        grads.append(torch.autograd.grad(loss, logits, torch.full_like(loss, 0.5))[0])
    assert_same(*grads, "grad_input")


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


@pytest.mark.parametrize("batched", [False, True], ids=["plain", "batched"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 2)], ids=str)
def test_infinite_factors_leave_ignored_rows_zero(shape, reduction, batched, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device).requires_grad_()
    ignored = torch.arange(shape[0] * math.prod(shape[2:])).reshape(shape[0], *shape[2:]) % 3 == 1
    target = torch.where(ignored, -100, 2).to(device)
    loss = cross_entropy(x, target, reduction=reduction)
    factor = torch.full_like(loss, math.inf)
    if batched:
        (grad,) = torch.autograd.grad(loss, x, factor[None], is_grads_batched=True)
    else:
        (grad,) = torch.autograd.grad(loss, x, factor)
    rows = grad.reshape(shape).movedim(1, -1)
    assert (rows[ignored] == 0).all()
    assert not rows[~ignored].isfinite().any()
