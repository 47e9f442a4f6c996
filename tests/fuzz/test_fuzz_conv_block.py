"""conv_block on drawn arguments: bit for bit PyTorch's numbers, or the same kind of error."""

from dataclasses import dataclass

import pytest
import torch
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
from helpers import assert_same
from hypothesis import assume, event, given
from hypothesis import strategies as st

from fastcls import build_info, reference
from fastcls.functional import conv_block, conv_block_path
from fastcls.ops import conv_block as op

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST_PRODUCTS = 200_000  # of a draw's convolution: about a millisecond in float64


@dataclass
class Drawn:
    """One call, and what it is to be compared with."""

    x: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor | None
    arguments: dict
    needs: tuple  # which of x, w, b want a gradient
    special: bool  # NaN and infinities in x


def pair_of(draw, least, most):
    """2 or (2, 3), and both as two numbers."""
    numbers = st.integers(least, most)
    if draw(st.booleans()):
        n = draw(numbers)
        return n, (n, n)
    both = draw(st.tuples(numbers, numbers))
    return one_of(draw, both, list(both)), both


def geometry(draw, path, why):
    """Keyword arguments of a legal call, and its kernel and least map."""
    if path == "winograd":
        padding, pads = pair_of(draw, 0, 3)
        arguments = {"padding": padding, "pool_size": one_of(draw, None, 2, (2, 2))}
        pool = (2, 2) if arguments["pool_size"] else (1, 1)
        kernel, steps, reach, pool_pads = (3, 3), (1, 1), (3, 3), (0, 0)
    else:
        kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        stride, steps = pair_of(draw, 1, 3)
        padding, pads = pair_of(draw, 0, 3)
        dilation, spread = pair_of(draw, 1, 3)
        reach = [d * (k - 1) + 1 for d, k in zip(spread, kernel, strict=True)]
        arguments = {"stride": stride, "padding": padding, "dilation": dilation}
        arguments["pool_size"], pool, pool_pads = None, (1, 1), (0, 0)
        if why == "window" or not one_in(draw, 4):
            least, most = (5, 17) if why == "window" else (1, 4)
            arguments["pool_size"], pool = pair_of(draw, least, most)
            arguments["pool_padding"], pool_pads = pair_of(draw, 0, min(pool) // 2)
            if draw(st.booleans()):
                arguments["pool_stride"], _ = pair_of(draw, 1, 4)
            arguments["ceil_mode"] = draw(st.booleans())
        if one_in(draw, 10):
            arguments["padding"], pads = "valid", (0, 0)
            if steps == (1, 1) and draw(st.booleans()):
                arguments["padding"] = "same"
    if draw(st.booleans()):
        arguments["activation"] = None
    size = []
    for step, pad, r, window, pool_pad in zip(steps, pads, reach, pool, pool_pads, strict=True):
        conv = max(window - 2 * pool_pad, 1) + draw(st.integers(0, 8))
        size.append(max((conv - 1) * step + r - 2 * pad + draw(st.integers(0, step - 1)), 1))
    return arguments, kernel, size


def channels(draw, path, why):
    """(in, out, groups)"""
    if path == "winograd":
        return one_of(draw, 16, 32), draw(st.integers(16, 40)), 1
    groups = draw(st.integers(2, 4)) if why == "groups" else 1
    return groups * draw(st.integers(1, 20)), groups * draw(st.integers(1, 24)), groups


def integers(g, most, shape, dtype):
    return torch.randint(-most, most + 1, shape, generator=g).to(dtype)


@st.composite
def calls(draw, path):
    """Legal calls of the op that the kernels of ``path`` serve."""
    why = one_of(draw, "groups", "float64", "window") if path == "general" else None
    arguments, kernel, (H, W) = geometry(draw, path, why)
    C, K, groups = channels(draw, path, why)
    if groups > 1 or one_in(draw, 8):
        arguments["groups"] = groups
    N = draw(st.integers(0, 3))
    if N * K * C // groups * H * W * kernel[0] * kernel[1] > MOST_PRODUCTS:
        N = min(N, 1)
    dtype = torch.float64 if why == "float64" else one_of(draw, *FLOATS)
    weight_dtype = dtype
    if dtype in FLOATS[1:] and draw(st.booleans()):
        weight_dtype = torch.float32
    # Small integers: every sum is exact in float32, whatever its order.
    g = generator(draw)
    x = integers(g, 2, (N, C, H, W), dtype)
    if special := one_in(draw, 6):
        for value, share in ((torch.nan, 0.02), (torch.inf, 0.01), (-torch.inf, 0.01)):
            x[torch.rand(x.shape, generator=g) < share] = value
    w = integers(g, 1, (K, C // groups, *kernel), weight_dtype)
    b = None if one_in(draw, 4) else laid_out(draw, integers(g, 2, (K,), weight_dtype))
    if N == 1 and one_in(draw, 4):
        x = x[0]
    needs = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    return Drawn(laid_out(draw, x), laid_out(draw, w), b, arguments, needs, special)


def leaves_of(drawn, dtype=None):
    """x, w and b as leaves of a graph; in ``dtype``, or as they lie in memory."""
    leaves = []
    for t, need in zip((drawn.x, drawn.w, drawn.b), drawn.needs, strict=True):
        if t is not None:
            t = t.detach() if dtype is None else t.detach().to(dtype).contiguous()
        leaves.append(t.requires_grad_() if t is not None and need else t)
    return leaves


def gradients(out, leaves, grad_out):
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return iter(torch.autograd.grad(out, wanted, grad_out)) if wanted else iter(())


def check(drawn, data):
    """Output and gradients are those of PyTorch in float64, rounded once; nothing else changes."""
    exact_leaves, leaves = leaves_of(drawn, torch.float64), leaves_of(drawn)
    exact = reference.conv_block(*exact_leaves, **drawn.arguments)
    grad_out = integers(generator(data.draw), 2, exact.shape, drawn.x.dtype)
    grad_out = laid_out(data.draw, grad_out)
    before = memory_of(drawn.x, drawn.w, drawn.b, grad_out)
    out = conv_block(*leaves, **drawn.arguments)
    assert_same(out.detach(), exact.detach().to(drawn.x.dtype), "out")
    ours = gradients(out, leaves, grad_out)
    theirs = gradients(exact, exact_leaves, grad_out.double())
    for name, leaf in zip(("input", "weight", "bias"), leaves, strict=True):
        if leaf is None or not leaf.requires_grad:
            continue
        grad, expected = next(ours), next(theirs)
        # The dense native sum multiplies NaN also with gradients of zero.
        if not (drawn.special and name == "weight"):
            assert_same(grad, expected.to(leaf.dtype), f"grad_{name}")
    assert same_memory(before, memory_of(drawn.x, drawn.w, drawn.b, grad_out)), "written to"


def path_taken(drawn):
    taken = conv_block_path(drawn.x, drawn.w, **drawn.arguments)
    event(f"path: {taken}")
    return taken


def path_expected(path, dtype):
    isa = build_info()["cpu_isa"]
    if isa == "scalar":
        return "general"
    pairs = isa == "avx512_bf16" and dtype == torch.bfloat16
    return "direct" if path == "winograd" and pairs else path


@pytest.mark.parametrize("path", ["direct", "winograd", "general"])
@draws(60)
@given(data=st.data())
def test_conv_block(path, data):
    drawn = data.draw(calls(path))
    taken, expected = path_taken(drawn), path_expected(path, drawn.x.dtype)
    by_chance = expected == "direct" and taken == "winograd"  # a 3 x 3 kernel was drawn
    assert taken == expected or by_chance
    check(drawn, data)


@pytest.mark.parametrize("arch, tf32", [(80, False), (80, True), (75, False)])
@pytest.mark.parametrize("path", ["direct", "winograd", "general"])
@draws(12)
@given(data=st.data())
def test_conv_block_emulated(path, arch, tf32, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_ops", emulator.load())
        patch.setattr(op, "_allow_tf32", lambda x: tf32 and x.dtype == torch.float32)
        patch.setenv("FASTCLS_EMULATED_ARCH", str(arch))
        drawn = data.draw(calls(path))
        path_taken(drawn)
        check(drawn, data)


# ------------------------------------------------------------------------------------- mistakes

SIZES = [0, -1, 1, 2, 7, 40, (1,), (1, 2, 3), (), (0, 1), (1, -2), [2], 1.5, (1, 1.5), "same",
         "full", None, True]  # fmt: skip
MISTAKES = {
    **dict.fromkeys(["stride", "padding", "dilation", "pool_padding"], SIZES),
    "pool_size": [size for size in SIZES if size is not None],  # None is no pool
    "pool_stride": [size for size in SIZES if size != ()],  # PyTorch's own way to say None
    "groups": [0, -1, 1, 2, 3, 5, 1.0, None, "one"],
    "ceil_mode": [1, 0, None, "yes"],
    "x": [
        lambda t: t[..., :0],
        lambda t: t[..., :2, :2],
        lambda t: t.transpose(-3, -1),
        lambda t: t.flatten(),
        lambda t: t.unsqueeze(0),
        lambda t: t.unsqueeze(0).unsqueeze(0),
        lambda t: t.long(),
        lambda t: t.double(),
        lambda t: t.bool(),
        lambda t: t.to(torch.complex64),
        lambda t: t.tolist(),
        lambda t: None,
    ],
}
MISTAKES["w"] = [
    *MISTAKES["x"],
    lambda t: t[:0],
    lambda t: t[:, :0],
    lambda t: t[:, 1:],
    lambda t: t[:-1],
    lambda t: t[..., 0],
    lambda t: t.half(),
]
MISTAKES["b"] = [  # another dtype is an error in some of PyTorch's kernels only
    lambda t: t[:0],
    lambda t: t[:1],
    lambda t: t[None],
    lambda t: t.sum(),
    lambda t: t.tolist(),
]


def with_mistake(draw, drawn):
    """The call's tensors and arguments with one of them replaced."""
    tensors = {"x": drawn.x, "w": drawn.w, "b": drawn.b}
    name = one_of(draw, *MISTAKES)
    if name == "ceil_mode" and drawn.arguments["pool_size"] is None:
        name = "groups"  # PyTorch is not asked
    wrong = one_of(draw, *MISTAKES[name])
    if name not in tensors:
        return tensors, drawn.arguments | {name: wrong}
    if tensors[name] is not None:
        tensors[name] = wrong(tensors[name])
    return tensors, drawn.arguments


@draws(200)
@given(data=st.data())
def test_mistakes_are_native_errors(data):
    drawn = data.draw(calls(one_of(data.draw, "direct", "general")))
    assume(drawn.x.numel())  # of an empty batch PyTorch checks less
    drawn.x, drawn.w, drawn.b = (t if t is None else t.float() for t in (drawn.x, drawn.w, drawn.b))
    tensors, arguments = with_mistake(data.draw, drawn)
    ours, our_error = outcome(conv_block, *tensors.values(), **arguments)
    # oneDNN of torch 2.14 ends the process at some legal images of one column between padding.
    with torch.backends.mkldnn.flags(enabled=False):
        native, error = outcome(reference.conv_block, *tensors.values(), **arguments)
    assert (our_error and our_error[0]) == (error and error[0]), (our_error, error)
    if our_error:
        assert our_error[1].startswith("conv_block: ")
    else:
        assert_same(ours, native, "out")
