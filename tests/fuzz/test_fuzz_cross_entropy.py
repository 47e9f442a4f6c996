"""cross_entropy on drawn arguments: PyTorch's numbers in float64, or the same kind of error."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from emulator import build as emulator
from fuzz.drawing import (
    draws,
    generator,
    laid_out,
    memory_of,
    one_in,
    one_of,
    outcome,
    same_memory,
)
from hypothesis import assume, event, given
from hypothesis import strategies as st

from fastcls import reference
from fastcls.functional import cross_entropy, cross_entropy_with_hits
from fastcls.ops import cross_entropy as op

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDICES = (
    torch.int64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


@dataclass
class Drawn:
    """One call."""

    x: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None
    settings: dict = field(default_factory=dict)  # ignore_index, reduction, label_smoothing
    needs: bool = True  # a gradient of x

    @property
    def class_dim(self):
        return min(1, self.x.dim() - 1)

    def ignored(self):
        """Which rows are, in a shape that fits x."""
        if self.target.is_floating_point():
            return torch.zeros((), dtype=torch.bool)
        rows = self.target.long() == self.settings["ignore_index"]
        return rows.view(()) if self.x.dim() == 1 else rows.unsqueeze(1)


@st.composite
def shapes(draw, most_classes):
    """(C), (N, C) or (N, C, d1, ...), and C: few classes more often than many."""
    least, most = one_of(draw, (1, 20), (1, 70), (90, 130), (1, most_classes))
    C = draw(st.integers(least, most))
    rank = draw(st.integers(1, 5))
    if rank == 1:
        return (C,), C
    N = draw(st.integers(0, 70 if rank == 2 and C <= 130 else 4))
    return (N, C, *(draw(st.integers(0 if one_in(draw, 8) else 1, 5)) for _ in range(rank - 2))), C


def logits(draw, g, shape, dtype):
    """Of any magnitude, with infinities and NaN in some draws."""
    x = torch.randn(shape, generator=g) * one_of(draw, 3.0, 0.0, 30.0, 1e3)
    if one_in(draw, 4):
        values = one_of(draw, (-torch.inf,), (-torch.inf, torch.inf), (torch.nan, -torch.inf))
        for value in values:
            x[torch.rand(shape, generator=g) < 0.1] = value
    return x.to(dtype)


def class_indices(draw, g, shape, C, ignore_index):
    dtype = one_of(draw, *INDICES)
    info = torch.iinfo(dtype)
    rows = shape[:1] + shape[2:]
    if len(shape) == 1:  # (1,) with one class would be the shape of probabilities
        rows = one_of(draw, (), (1,)) if C > 1 else ()
    target = torch.randint(min(C, info.max + 1), rows, generator=g)
    if info.min <= ignore_index <= info.max and draw(st.booleans()):
        target[torch.rand(rows, generator=g) < one_of(draw, 0.3, 1.0)] = ignore_index
    return target.to(dtype)


def probabilities(draw, g, shape, dtype):
    return torch.rand(shape, generator=g).softmax(min(1, len(shape) - 1)).to(dtype)


@st.composite
def calls(draw, most_classes=1200):
    """Legal calls of the op."""
    shape, C = draw(shapes(most_classes))
    g = generator(draw)
    dtype = one_of(draw, *FLOATS)
    half = dtype in FLOATS[1:3]
    x = laid_out(draw, logits(draw, g, shape, dtype))
    settings = {
        "ignore_index": -100,
        "reduction": one_of(draw, "mean", "sum", "none"),
        "label_smoothing": one_of(draw, 0.0, 0.1, 1.0, -0.5),
    }
    if one_in(draw, 4):
        target = probabilities(draw, g, shape, torch.float32 if half and one_in(draw, 2) else dtype)
    else:
        settings["ignore_index"] = one_of(draw, -100, 0, C - 1, -1, 255, 2**40, -(2**40))
        target = class_indices(draw, g, shape, C, settings["ignore_index"])
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(C, generator=g) + 0.1
        if one_in(draw, 3):
            weight[torch.rand(C, generator=g) < 0.3] = 0
        weight = laid_out(draw, weight.to(torch.float32 if half and one_in(draw, 2) else dtype))
    return Drawn(x, laid_out(draw, target), weight, settings, needs=not one_in(draw, 4))


def in_float64(t):
    return t.double() if t is not None and t.is_floating_point() else t


def assert_close(ours, exact, scale, what):
    """Up to rounding: some ulps of float32 (float64) of ``scale``, two of the result's dtype."""
    inside = torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps
    torch.testing.assert_close(
        ours,
        exact.to(ours.dtype),
        atol=inside * scale,
        rtol=2 * torch.finfo(ours.dtype).eps,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def exact_loss(x64, drawn):
    target = in_float64(drawn.target)
    if x64.dim() == 1 and target.shape == (1,) != x64.shape:
        target = target[0]  # PyTorch has no backward pass for this shape
    return reference.cross_entropy(x64, target, in_float64(drawn.weight), **drawn.settings)


def greatest(t):
    t = t[t.isfinite()]
    return t.abs().max().item() if t.numel() else 0.0


def check(drawn, data):
    x = drawn.x.detach().requires_grad_(drawn.needs)
    x64 = drawn.x.detach().double().requires_grad_(drawn.needs)
    target, weight = drawn.target, drawn.weight
    exact = exact_loss(x64, drawn)
    g = generator(data.draw)
    grad_loss = torch.randint(-3, 4, exact.shape, generator=g).to(x.dtype)
    grad_loss = laid_out(data.draw, grad_loss)
    before = memory_of(drawn.x, target, weight, grad_loss)
    if not target.is_floating_point() and one_in(data.draw, 4):
        loss, hits = cross_entropy_with_hits(x, target, weight, **drawn.settings)
        assert hits == hits_of(drawn)
    else:
        loss = cross_entropy(x, target, weight, **drawn.settings)
    # What a loss is the difference of: logits and log C, times weights, summed over rows. A mean
    # divides by small weights again.
    heaviest = 1.0 if weight is None else max(greatest(weight.double()), 1.0)
    rows = max(loss.numel(), x.numel() // max(x.shape[drawn.class_dim], 1), 1)
    # Smoothing adds up C of them: up to C roundings.
    C = x.shape[drawn.class_dim]
    scale = (greatest(x.detach().double()) + 8) * heaviest * (32 + C)
    scale = scale * (rows if drawn.settings["reduction"] == "sum" else 1)
    assert loss.dtype == (x.dtype if float_loss(drawn) is None else float_loss(drawn))
    assert_close(loss.detach(), exact.detach(), scale, "loss")
    if drawn.needs:
        (grad,) = torch.autograd.grad(loss, x, grad_loss.to(loss.dtype))
        (expected,) = torch.autograd.grad(exact, x64, grad_loss.double())
        # PyTorch's gradient of an ignored row is NaN where its logits are.
        expected = expected.masked_fill(drawn.ignored(), 0)
        assert_close(grad, expected, 3 * heaviest * (32 + C), "gradient")
    assert same_memory(before, memory_of(drawn.x, target, weight, grad_loss)), "written to"


def float_loss(drawn):
    """The loss's dtype where it is not that of the logits: promoted by probabilities."""
    if not drawn.target.is_floating_point():
        return None
    dtype = torch.promote_types(drawn.x.dtype, drawn.target.dtype)
    return dtype if drawn.weight is None else torch.promote_types(dtype, drawn.weight.dtype)


def hits_of(drawn):
    """Right predictions; rows with NaN and ignored ones count for nothing."""
    x, d = drawn.x.double(), drawn.class_dim
    target = drawn.target.long().view(() if x.dim() == 1 else drawn.target.shape)
    counts = (target != drawn.settings["ignore_index"]) & ~x.isnan().any(d)
    return ((x.argmax(d) == target) & counts).sum() if x.numel() else 0


def count_kind(drawn):
    event("target: " + ("probabilities" if drawn.target.is_floating_point() else "indices"))


@draws(250)
@given(data=st.data())
def test_cross_entropy(data):
    drawn = data.draw(calls())
    count_kind(drawn)
    check(drawn, data)


@draws(60)
@given(data=st.data())
def test_cross_entropy_emulated(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_ops", emulator.load())
        patch.setattr(op, "_plain_cross_entropy", lambda *_: None)
        drawn = data.draw(calls(most_classes=300))
        count_kind(drawn)
        check(drawn, data)


# ------------------------------------------------------------------------------------- mistakes

WRONG = [
    lambda t: t[..., :0],
    lambda t: t[:1],
    lambda t: t[:-1],
    lambda t: t.long(),
    lambda t: t.bool(),
    lambda t: t.double(),
    lambda t: t.float(),
    lambda t: t.tolist(),
]
WRONG_TENSORS = [
    *WRONG,
    lambda t: t.sum(),
    lambda t: t[None],
    lambda t: t[..., None],
    lambda t: t.flatten(),
    lambda t: t.to(torch.complex64),
]
OUTSIDE = [
    lambda t, C: C,
    lambda t, C: -1,
    lambda t, C: -100,
    lambda t, C: torch.iinfo(t.dtype).max,
    lambda t, C: torch.iinfo(t.dtype).min,
]
MISTAKES = {
    "x": WRONG_TENSORS,
    "target": WRONG_TENSORS,
    "weight": WRONG,  # PyTorch takes complex ones, and sometimes another number of dimensions
    "outside": OUTSIDE,
    "settings": [
        {"ignore_index": 2},
        {"ignore_index": 1.5},
        {"ignore_index": None},
        {"reduction": "average"},
        {"reduction": None},
        {"label_smoothing": 1.5},
        {"label_smoothing": float("nan")},
        {"label_smoothing": None},
    ],
}


def in_dtype(t, dtypes, dtype):
    return t.to(dtype) if isinstance(t, torch.Tensor) and t.dtype in dtypes else t


def make_mistake(draw, drawn):
    name = one_of(draw, *MISTAKES)
    wrong = one_of(draw, *MISTAKES[name])
    event(f"mistake: {name}")
    if name == "settings":
        drawn.settings |= wrong
    elif name == "outside":
        if not drawn.target.is_floating_point() and drawn.target.numel():
            value = wrong(drawn.target, drawn.x.shape[drawn.class_dim])
            info = torch.iinfo(drawn.target.dtype)
            drawn.target = drawn.target.contiguous()
            drawn.target.view(-1)[-1] = max(min(value, info.max), info.min)
    elif getattr(drawn, name) is not None:
        assume(getattr(drawn, name).dim() or wrong not in WRONG[:3])
        setattr(drawn, name, wrong(getattr(drawn, name)))


def same_kind(ours, native):
    """Are both the same kind of error, or none?"""
    if ours is None or native is None:
        return ours is native
    # PyTorch trips over some shapes before it comes to the check.
    told = ("target must have batch size", "input must have shape (C), (N, C) or")
    return ours[0] is native[0] or any(text in ours[1] for text in told)


def native_is_right(x, target, _):
    """Of an empty batch PyTorch checks less; it refuses one target of shape (1,) when smoothing."""
    if not (isinstance(x, torch.Tensor) and isinstance(target, torch.Tensor)):
        return True
    return x.numel() > 0 and not (x.dim() == 1 and target.shape == (1,))


@draws(200)
@given(data=st.data())
def test_mistakes_are_native_errors(data):
    drawn = data.draw(calls())
    tensors = drawn.x, drawn.target, drawn.weight
    # PyTorch refuses mixed floats; it is not asked about them.
    drawn.x, drawn.target, drawn.weight = (in_dtype(t, FLOATS, torch.float32) for t in tensors)
    make_mistake(data.draw, drawn)
    tensors = drawn.x, drawn.target, drawn.weight
    assume(native_is_right(*tensors))
    ours, our_error = outcome(cross_entropy, *tensors, **drawn.settings)
    tensors = (in_dtype(t, INDICES, torch.int64) for t in tensors)  # the only one it takes
    native, error = outcome(F.cross_entropy, *tensors, **drawn.settings)
    assert same_kind(our_error, error), (our_error, error)
    if our_error:
        assert our_error[1].startswith("cross_entropy: ")
    else:
        torch.testing.assert_close(ours, native, equal_nan=True, rtol=0.05, atol=0.05)
