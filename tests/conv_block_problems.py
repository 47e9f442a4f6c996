"""Inputs and expected results of the tests of conv_block."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import CORNERS, REFERENCE
from helpers import LAYOUTS, with_layout

from fastcls import reference
from fastcls._arguments import conv_block_arguments
from fastcls.functional import conv_block
from fastcls.ops import conv_block as op

# The reference nets' layers, with maps and batches that the general kernel does in milliseconds.
SIZES = {"vgg2": {"height": 18, "width": 18}, "alexnet1": {"height": 63, "width": 63}}
CASES = CORNERS + [replace(c, batch=2, **SIZES.get(c.name, {})) for c in REFERENCE]
BY_NAME = {c.name: c for c in CASES}

# dtype of the input and of the parameters.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float16-float32": (torch.float16, torch.float32),
}
every_dtype = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

# Tracing asks for the ops' fakes, which the emulated ones lack.
not_emulated = pytest.mark.parametrize("device", ["cpu", "cuda"], indirect=True)


def positional(case):
    return conv_block_arguments(**case.function_arguments)


def forward_with_winner(x, w, b, case):
    """The op itself, as autograd calls it."""
    return op._ops.conv_block_forward(x, w, b, *positional(case), True, op._allow_tf32(x))


def backward(grad_out, x, w, winner, case, needs=(True, True, True)):
    tf32 = op._allow_tf32(x)
    return op._ops.conv_block_backward(grad_out, x, w, winner, *positional(case), *needs, tf32)


def integers(generator, least, greatest, shape):
    return torch.randint(least, greatest + 1, shape, generator=generator).double()


@functools.cache
def integer_problem(case, expanded=False):
    """Small integers, so that all sums are exact in every dtype: float64 (x, w, b, grad_out)."""
    g = torch.Generator().manual_seed(1)
    x = integers(g, -2, 2, (case.batch, case.in_channels, case.height, case.width))
    if expanded:
        x = with_layout(x, "expanded").contiguous()
    w = integers(g, -1, 1, case.weight_shape)
    b = integers(g, -2, 2, (case.out_channels,)) if case.bias else None
    out = reference.conv_block(x, w, b, **case.function_arguments)
    assert out.abs().max() <= 256, "not exact in bfloat16"
    return x, w, b, integers(g, -2, 2, out.shape)


@functools.cache
def integer_answer(case, expanded=False):
    """What native PyTorch makes of it in float64: out, indices (or None), shut, gradients."""
    x, w, b, grad_out = integer_problem(case, expanded)
    leaves = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    out = reference.conv_block(*leaves, *([] if case.bias else [None]), **case.function_arguments)
    conv = F.conv2d(x, w, b, case.stride, case.padding, case.dilation, case.groups)
    best, indices = conv, torch.arange(conv[0, 0].numel()).view(conv.shape[2:]).expand_as(conv)
    if case.pool_size is not None:
        pooling = (case.pool_size, case.pool_stride, case.pool_padding, 1, case.ceil_mode)
        best, indices = F.max_pool2d(conv, *pooling, return_indices=True)
    shut = best <= 0 if case.activation else torch.zeros_like(best, dtype=torch.bool)
    grads = torch.autograd.grad(out, leaves, grad_out)
    return out.detach(), indices, shut, conv.shape[3], grads


def random_problem(case, dtypes, device):
    """Normally distributed (x, w, b, grad_out); conv outputs of about unit size."""
    g = torch.Generator().manual_seed(2)
    dtype, weight_dtype = dtypes
    x = torch.randn(case.batch, case.in_channels, case.height, case.width, generator=g)
    w = torch.randn(case.weight_shape, generator=g)
    w /= w[0].numel() ** 0.5
    b = torch.randn(case.out_channels, generator=g) / 2 if case.bias else None
    shape = reference.conv_block(x, w, b, **case.function_arguments).shape
    grad_out = torch.randn(shape, generator=g)
    b = b if b is None else b.to(device, weight_dtype)
    return x.to(device, dtype), w.to(device, weight_dtype), b, grad_out.to(device, dtype)


def leaves_of(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(out, leaves, grad_out):
    return torch.autograd.grad(out, [t for t in leaves if t is not None], grad_out)


def given_winner_gradients(x, w, b, grad_out, winner, case):
    leaves = leaves_of(x, w, b)
    out = reference.conv_block_given_winner(*leaves, winner, positional(case))
    return out.detach(), gradients(out, leaves, grad_out)


def run(case, dtypes, device):
    *tensors, grad_out = random_problem(case, dtypes, device)
    leaves = leaves_of(*tensors)
    out = conv_block(*leaves, **case.function_arguments)
    return [out.detach(), *gradients(out, leaves, grad_out)]
