"""Data, layouts, error bounds and runs of a model that the tests share."""

import hashlib
import os
import subprocess
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Memory layouts of a 4D tensor. Every one but "expanded" holds the values it is given.
LAYOUTS = [
    "contiguous",
    "channels_last",
    "sliced",
    "channels_last_sliced",
    "strided",
    "transposed",
    "expanded",
]


def with_layout(t, layout):
    """`t` laid out in memory as `layout` says.

    The sliced and strided ones lie between NaNs in a bigger tensor, so that a read outside shows
    in the result; "expanded" repeats the first channel of the first image with strides of 0.
    """
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return t[:1, :1].clone().expand(t.shape)
    step = 2 if layout == "strided" else 1
    n, c, h, w = t.shape
    bigger = t.new_full((n + 1, c + 2, h + 3, step * w + 2), torch.nan)
    if layout == "channels_last_sliced":
        bigger = bigger.contiguous(memory_format=torch.channels_last)
    return bigger[1:, 1:-1, 2:-1, 1 : step * w + 1 : step].copy_(t)


def is_channels_last(layout):
    return layout.startswith("channels_last")


def assert_error_within_twice_native(ours, natives, exact, what, *, one_rounding=False, ulps=2):
    """Against `exact`, ours has at most twice native's error: largest and root mean square.

    Native's error is the larger one of `natives`: PyTorch has several kernels for one result, which
    differ by a factor of three. Two ulps of the values (``ulps``) are always allowed, where native
    happens to be exact. In float64 `exact` is no better than `ours`, and long sums differ by more:
    64 ulps.
    ``one_rounding``: half-precision results are rounded once, from float32 sums, which is all their
    error. The root mean square must then be native's: another rounding mode would double it.
    """
    assert ours.shape == exact.shape, f"{what}: shape {ours.shape}, expected {exact.shape}"
    if exact.numel() == 0:
        return
    assert exact.isfinite().all(), f"{what}: the reference is not finite"
    eps = torch.finfo(ours.dtype).eps
    ulps = 64 if ours.dtype == torch.float64 else ulps
    half = one_rounding and ours.dtype in (torch.bfloat16, torch.float16)
    for norm, size, factor, floor in (
        ("max", lambda t: t.abs().max(), 2, ulps),
        ("rms", lambda t: t.square().mean().sqrt(), *((1.2, 0.1) if half else (2, ulps))),
    ):
        error = size(ours.double() - exact)
        native = max(size(n.double() - exact) for n in natives)
        bound = factor * native + floor * eps * size(exact)
        assert error <= bound, (
            f"{what}: {norm} error {error:.3e}, bound {bound:.3e}; native {native:.3e}, value "
            f"{size(exact):.3e}, eps {eps:.1e}, {ours.numel()} elements"
        )


def assert_same(ours, expected, what):
    """Bit for bit the same numbers, NaN equal to NaN; dtype included."""
    torch.testing.assert_close(
        ours, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


class Calls(TorchDispatchMode):
    """Counts the fused ops that run."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastcls":
            self.ops.append(func._schema.name.removeprefix("fastcls::"))
        return func(*args, **(kwargs or {}))


def run_model(model, x, train):
    """Output, gradients of input and parameters, and the fused ops that were called."""
    model.train(train)
    torch.manual_seed(1)  # of the dropouts
    x = x.clone().requires_grad_()
    with Calls() as calls:
        out = model(x)
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        grads = torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)
    return [out.detach(), *grads], calls.ops


def digest(tensors):
    """A hash of the tensors' values."""
    data = b"".join(t.detach().double().contiguous().numpy().tobytes() for t in tensors)
    return hashlib.sha256(data).hexdigest()


def assert_digests_do_not_depend_on_memory(file):
    """``digests()`` of a test file prints the same, whatever the memory held that it is given.

    glibc fills what it hands out with the complement of MALLOC_PERTURB_: zeros, or 3.4e38. Small
    blocks of its per-thread cache go unfilled, so it does without.
    """
    answers = []
    for fill in ("255", "128"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {file.stem} as tests; tests.digests()"],
            env={
                **os.environ,
                "MALLOC_PERTURB_": fill,
                "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            cwd=file.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append(done.stdout.splitlines())
    assert answers[0] and answers[0] == answers[1]
