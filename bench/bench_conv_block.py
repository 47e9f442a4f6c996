"""conv_block against PyTorch: one layer, training (forward and backward) and inference."""

import functools

import pytest
import torch
from cases import REFERENCE, ConvCase
from measure import Replay, autocast, on_cuda, rotate, torch_dtype
from torch import nn

from fastcls import FusedConvBlock
from fastcls.reference import NativeConvBlock

CASES = REFERENCE
FEW_COMPILED = [("train", "bfloat16"), ("train", "tf32")]  # with --few-compiled
# Buffers to rotate over: enough to leave the caches, few enough to fit the memory.
BUFFER_BYTES, MAX_BUFFERS = 256 << 20, 8


def is_first(case):
    """A net's first layer: its input needs no gradient and is float32 under autocast too."""
    return case.why.startswith("first")


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


FORMATS = {"": torch.contiguous_format, "-cl": torch.channels_last}
COMPILED = {  # CUDA graphs are ours in all sides: Inductor's copy their inputs
    "compile": {},
    "compile-max": {"mode": "max-autotune-no-cudagraphs"},
}


def make_sides(case, mode, dtype, batch, peers):
    """{name: function that runs one step}; a name ending in -cl has channels-last tensors.

    "-graph": a CUDA graph with one step for each of the buffers.
    """
    names = ["fused-cl", "fused-graph-cl"] if on_cuda() else ["fused", "fused-cl"]
    names += [name for name in peers if name.split("-")[0] in ("eager", "compile")]
    ends = {"-cl" if name.endswith("-cl") else "" for name in names}
    data = {end: buffers(case, dtype, batch, FORMATS[end]) for end in ends}

    @functools.cache  # what is compiled serves with a graph and without
    def block_of(kind, end):
        block = FusedConvBlock if kind == "fused" else NativeConvBlock
        block = make_block(block, case, FORMATS[end])
        if kind in COMPILED:
            block.compile(dynamic=False, **COMPILED[kind])
        return block

    def side(name):
        end = "-cl" if name.endswith("-cl") else ""
        kind = name.removesuffix("-cl").removesuffix("-graph")
        step = functools.partial(STEPS[mode], block_of(kind, end), dtype)
        if "-graph" in name:
            return Replay([functools.partial(step, *tensors) for tensors in data[end]])
        turns = rotate(data[end])
        return lambda: step(*next(turns))

    return {name: side(name) for name in names}


def check(case, mode, dtype, batch):
    """Fused against native on small whole numbers, where every sum is exact.

    In float32; on CUDA in float64, for which no library transforms a convolution.
    """
    x_shape, _, out_shape = shapes(case, batch)
    exact = torch.float64 if on_cuda() else torch.float32
    memory_format = torch.channels_last if on_cuda() else torch.contiguous_format
    torch.manual_seed(1)
    kinds = (FusedConvBlock, NativeConvBlock)
    fused, native = (make_block(kind, case, memory_format) for kind in kinds)
    native.to(exact)
    with torch.no_grad():
        for ours, theirs in zip(fused.parameters(), native.parameters(), strict=True):
            ours.copy_(theirs.copy_(torch.randint(-1, 2, ours.shape)))
    x, grad = (
        torch.randint(-1, 2, s).contiguous(memory_format=memory_format)
        for s in (x_shape, out_shape)
    )
    results = []
    for block, t in ((fused, dtype), (native, exact)):
        x_type = torch.float32 if t == dtype and is_first(case) else t
        x_side = x.to(x_type).requires_grad_(not is_first(case))
        results.append(STEPS[mode](block, t, x_side, grad.to(t)))
    for ours, theirs in zip(*results, strict=True):
        # Whole numbers beyond 256 are rounded where the result is bfloat16.
        rtol = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.float(), theirs.float(), atol=0, rtol=rtol)


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_conv_block(case, batch, mode, dtype, threads, peers, measure):
    kind = torch_dtype(dtype)
    if measure:
        row = {
            "op": "conv_block",
            "case": case.name,
            "mode": mode,
            "dtype": dtype,
            "batch": batch,
            "own_batch": case.batch != ConvCase.batch,
            **work(case, mode, kind, batch),
        }
        measure(row, functools.partial(make_sides, case, mode, kind, batch, peers))
    check(case, mode, kind, batch)
