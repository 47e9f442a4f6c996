"""conv_block against PyTorch: one layer, training (forward and backward) and inference."""

import contextlib
import functools

import pytest
import torch
from cases import REFERENCE, ConvCase
from measure import graphed, on_cuda, rotate
from torch import nn

from fastcls import FusedConvBlock
from fastcls.reference import NativeConvBlock

CASES = REFERENCE
# Buffers to rotate over: enough to leave the caches, few enough to fit the memory.
BUFFER_BYTES, MAX_BUFFERS = 128 << 20, 8


def is_first(case):
    """A net's first layer: its input needs no gradient and is float32 under autocast too."""
    return case.why.startswith("first")


def autocast(dtype):
    """Where the layer runs: bfloat16 means float32 parameters under autocast, as in training."""
    return (
        contextlib.nullcontext()
        if dtype == torch.float32
        else torch.autocast(torch.get_default_device().type, dtype)
    )


def make_block(kind, case, memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    return kind(**case.block_arguments).to(memory_format=memory_format)


def input_dtype(case, dtype):
    return torch.float32 if is_first(case) else dtype


def shapes(case, batch):
    """Shapes of the input, of the convolution's map and of the output."""
    x = torch.empty(batch, case.in_channels, case.height, case.width, device="meta")
    native = make_block(NativeConvBlock, case).to("meta")
    return x.shape, nn.Conv2d.forward(native, x).shape, native(x).shape


def work(case, mode, dtype, batch):
    """Bytes that must move at least, and FLOPs of the dense convolutions, by mode.

    Inference reads input and weight and writes the output. Training writes one byte per output
    besides, and reads it, the input and the weight again when the gradient comes back, which
    happens when the caches have long seen other layers.
    """
    x, conv_map, out = (s.numel() for s in shapes(case, batch))
    weight = torch.Size(case.weight_shape).numel()
    x_bytes, out_bytes = x * input_dtype(case, dtype).itemsize, out * dtype.itemsize
    flops = 2 * conv_map * weight // case.out_channels
    forward = x_bytes + 4 * weight + out_bytes
    if mode == "infer":
        return {"bytes": forward, "flops": flops}
    backward = x_bytes + out_bytes + 2 * 4 * weight + (0 if is_first(case) else x_bytes)
    return {
        "bytes": forward + backward + 2 * out,
        "flops": flops * (2 if is_first(case) else 3),
    }


def buffers(case, dtype, batch, memory_format):
    """[(input, gradient of the output)], in number enough to come from memory each time."""
    x_shape, _, out_shape = shapes(case, batch)

    def one():
        x = torch.randn(x_shape, dtype=input_dtype(case, dtype))
        grad = torch.randn(out_shape, dtype=dtype)
        x, grad = (t.contiguous(memory_format=memory_format) for t in (x, grad))
        return x.requires_grad_(not is_first(case)), grad

    first = one()
    count = BUFFER_BYTES // sum(t.nbytes for t in first)
    return [first] + [one() for _ in range(min(max(count, 2), MAX_BUFFERS) - 1)]


def train_step(block, dtype, x, grad):
    with autocast(dtype):
        out = block(x)
    wanted = [*block.parameters(), *([x] if x.requires_grad else [])]
    return out, *torch.autograd.grad(out, wanted, grad)


def infer_step(block, dtype, x, _):
    with torch.no_grad(), autocast(dtype):
        return (block(x),)


STEPS = {"train": train_step, "infer": infer_step}


def make_sides(case, mode, dtype, batch, peers):
    """{name: function that runs one step}; a name ending in -cl has channels-last tensors."""
    formats = {"": torch.contiguous_format, "-cl": torch.channels_last}
    data = {end: buffers(case, dtype, batch, fmt) for end, fmt in formats.items()}

    def side(name):
        end = "-cl" if name.endswith("-cl") else ""
        kind = FusedConvBlock if name.startswith("fused") else NativeConvBlock
        block = make_block(kind, case, formats[end])
        if "-max" in name:
            block.compile(dynamic=False, mode="max-autotune")
        elif name.startswith("compile"):
            block.compile(dynamic=False)
        if "-graph" in name:
            step = functools.partial(STEPS[mode], block, dtype)
            return graphed([functools.partial(step, *tensors) for tensors in data[end]])
        turns = rotate(data[end])
        return lambda: STEPS[mode](block, dtype, *next(turns))

    ours = ["fused", "fused-cl", *(["fused-graph-cl"] if on_cuda() else [])]
    return {name: side(name) for name in [*ours, *peers]}


def check(case, mode, dtype, batch):
    """Fused against native in float32, on small whole numbers, where every sum is exact."""
    x_shape, _, out_shape = shapes(case, batch)
    torch.manual_seed(1)
    blocks = [make_block(kind, case) for kind in (FusedConvBlock, NativeConvBlock)]
    with torch.no_grad():
        for ours, theirs in zip(*(b.parameters() for b in blocks), strict=True):
            ours.copy_(theirs.copy_(torch.randint(-1, 2, ours.shape)))
    x, grad = (torch.randint(-1, 2, s).float() for s in (x_shape, out_shape))
    results = []
    for block, t in zip(blocks, (dtype, torch.float32), strict=True):
        x_side = x.to(input_dtype(case, t)).requires_grad_(not is_first(case))
        results.append(STEPS[mode](block, t, x_side, grad.to(t)))
    for ours, theirs in zip(*results, strict=True):
        # Whole numbers beyond 256 are rounded where the result is bfloat16.
        torch.testing.assert_close(ours.float(), theirs, atol=0, rtol=torch.finfo(ours.dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_conv_block(case, batch, mode, dtype, threads, peers, measure):
    if measure:
        row = {
            "op": "conv_block",
            "case": case.name,
            "mode": mode,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "own_batch": case.batch != ConvCase.batch,
            **work(case, mode, dtype, batch),
        }
        measure(row, make_sides(case, mode, dtype, batch, peers))
    check(case, mode, dtype, batch)
