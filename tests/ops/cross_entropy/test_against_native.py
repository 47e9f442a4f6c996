"""Parity of cross_entropy with PyTorch: every kind of target, argument, dtype and layout."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_problems import (
    DTYPES,
    INDEX_DTYPES,
    NAN,
    REDUCTIONS,
    SHAPE_IDS,
    SHAPES,
    assert_like_native,
    class_weight,
    in_dtype,
    make_case,
    value_and_grad,
)
from helpers import LAYOUTS, with_layout

from fastcls.functional import cross_entropy


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [s for s, _ in SHAPES], ids=SHAPE_IDS)
def test_float32_probabilities_keep_their_digits_beside_half_logits(device, shape, dtype):
    input, target = make_case(shape, "prob", torch.float32, device)
    input = input.to(dtype)
    weight = class_weight(shape[min(1, len(shape) - 1)], device=device)
    for arguments in ({}, {"label_smoothing": 0.1}, {"weight": weight}):
        loss, grad = value_and_grad(cross_entropy, input, target, **arguments)
        double = {k: v.double() if k == "weight" else v for k, v in arguments.items()}
        expected = value_and_grad(F.cross_entropy, input.double(), target.double(), **double)
        torch.testing.assert_close(loss.double(), expected[0], rtol=1e-6, atol=1e-6)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(grad.double(), expected[1], rtol=eps, atol=1e-7)


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
