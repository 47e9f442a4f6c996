"""cross_entropy's CUDA kernels, on a GPU and emulated on the host."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_problems import (
    DTYPES,
    EDGE_ROWS,
    EMPTY_SHAPES,
    IGNORED,
    INDEX_DTYPES,
    INF,
    NAN,
    SHAPES_FOR_MEANS,
    assert_hits,
    assert_like_native,
    batch_shape,
    check_empty,
    check_gradient_at_a_sure_target,
    check_hits,
    check_hits_at_the_edges,
    check_mean_over_nothing,
    check_mean_over_one_row_without_weight,
    class_weight,
    make_case,
    value_and_grad,
)
from helpers import LAYOUTS, with_layout

from fastcls import reference
from fastcls.functional import cross_entropy
from fastcls.ops import cross_entropy as op

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
        for ops, device in ((torch.ops.fastcls, "cpu"), (op._ops, cuda_kernels)):
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
    monkeypatch.setattr(op, "_on_cuda", lambda input: True)
    monkeypatch.setattr(op, "_ONE_READ_BYTES", 3 * 100 * dtype.itemsize)
    input, target = make_case((3, 100), "index", dtype)
    weight = class_weight(100, dtype)

    def saved(input, target=target, weight=None, reduction=1, smoothing=0.0):
        settings = (IGNORED, reduction, smoothing)
        return op._save_of(input, target, weight, settings)

    served = dtype in (torch.float32, torch.bfloat16)
    assert saved(input) == (op._SAVE_GRAD if served else op._SAVE_ROWS)
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
    assert set(rows) == {op._SAVE_ROWS}


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
        saved = op._ops.cross_entropy_forward(*arguments)[1]
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
