"""conv_block: the function, its fake (shapes for tracing), its backward."""

import inspect

import torch
import torch.nn.functional as F

from fastcls import _load as _load
from fastcls import reference
from fastcls._arguments import conv_block_arguments, pair
from fastcls.ops.common import (
    HALF,
    check_fake_devices,
    check_tensor,
    decomposed,
    define_exported,
    exporting,
    needs_grad,
)

_ops = torch.ops.fastcls


def conv_block(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation="relu",
    pool_size=2,
    pool_stride=None,
    pool_padding=0,
    ceil_mode=False,
):
    """2D convolution, bias, ReLU and max-pool in one op, with its own backward.

    Equal to ``max_pool2d(relu(conv2d(input, weight, bias)))``, corner cases included: the first
    maximum of a window in row-major order gets the gradient, NaN goes through, ReLU'(0) = 0, pool
    padding counts as −inf. The conv map is never stored: the backward pass needs ``input``,
    ``weight`` and one byte per output (the place of the maximum in its window, or "ReLU shut").

    Args:
        input: (N, C, H, W), or (C, H, W) without a batch; float32, float64, bfloat16 or float16;
            any strides.
        weight: (K, C / groups, kernel_h, kernel_w); input's dtype, or float32 with a half-precision
            input: its gradient is float32 then. Sums are float32, or float64 for float64. Where
            the processor multiplies bfloat16 in pairs (AVX-512 BF16), a float32 weight that meets
            it may be rounded to bfloat16.
        bias: (K,) with weight's dtype, or None.
        stride, padding, dilation: int or (height, width), as in ``torch.nn.functional.conv2d``;
            padding may also be "valid" or "same".
        groups: number of channel groups.
        activation: "relu", or None for no ReLU.
        pool_size: int or (height, width) of the max-pool window, or None for no pool.
        pool_stride: default ``pool_size``.
        pool_padding, ceil_mode: as in ``torch.nn.functional.max_pool2d``.

    Under autocast the op runs in the autocast dtype of the input's device; a float32 weight is
    read without a cast copy. On CUDA a float32 product rounds its operands to tf32 where
    ``torch.backends.cudnn.conv.fp32_precision`` says "tf32", PyTorch's default for convolutions;
    elsewhere it is as exact as float32, but NaN may stand where a product of finite floats is
    infinite.

    Returns:
        (N, K, out_h, out_w), or (K, out_h, out_w): input's dtype and memory format. An input of one
        channel lies the same way in both formats: its output is channels-last if weight is.

    Raises:
        TypeError: an argument of the wrong Python type.
        RuntimeError: shapes, dtypes, devices or sizes that do not fit, named in the message.
        ValueError: unknown activation.
    """
    check_tensor("conv_block", "input", input)
    check_tensor("conv_block", "weight", weight)
    if bias is not None:
        check_tensor("conv_block", "bias", bias)
    if input.dim() == 3:
        batched = conv_block(
            input.unsqueeze(0),
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            activation=activation,
            pool_size=pool_size,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            ceil_mode=ceil_mode,
        )
        return batched.squeeze(0)
    if isinstance(padding, str):
        input, padding = _pad_by_name(input, weight, padding, stride, dilation)
    arguments = conv_block_arguments(
        stride,
        padding,
        dilation,
        groups,
        activation,
        pool_size,
        pool_stride,
        pool_padding,
        ceil_mode,
    )
    if torch.compiler.is_compiling() and exporting():
        return _ops.conv_block.default(input, weight, bias, *arguments)
    return _conv_block(input, weight, bias, arguments)


def _conv_block(input, weight, bias, arguments):
    """``conv_block`` with the geometry as the ops take it."""
    if decomposed():
        return _reference(input, *_like_half(input, weight, bias), *arguments)
    input, weight, bias = _autocast(input, weight, bias)
    tf32 = _allow_tf32(input)
    if needs_grad(input, weight, bias):
        function = _TracedConvBlock if torch.compiler.is_compiling() else _ConvBlock
        return function.apply(input, weight, bias, arguments, tf32)[0]
    return _ops.conv_block_forward.default(input, weight, bias, *arguments, False, tf32)[0]


def _reference(input, weight, bias, stride, padding, dilation, groups, relu, *pool):
    size, step, pool_padding, ceil_mode = pool
    return reference.conv_block(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation="relu" if relu else None,
        pool_size=size or None,
        pool_stride=step,
        pool_padding=pool_padding,
        ceil_mode=ceil_mode,
    )


def _like_half(input, weight, bias):
    """Weight and bias for native ops, which want the dtype of a half-precision input."""
    if input.dtype not in HALF or weight.dtype != torch.float32:
        return weight, bias
    return weight.to(input.dtype), None if bias is None else bias.to(input.dtype)


def _allow_tf32(input):
    """May the op round float32 operands to tf32? PyTorch's own setting for convolutions says so."""
    return input.dtype == torch.float32 and input.is_cuda and _cudnn_allows_tf32()


@torch.compiler.assume_constant_result
def _cudnn_allows_tf32():
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


_PATHS = ("general", "direct", "winograd", "gemm")


def conv_block_path(input, weight, **arguments):
    """The kernel that ``conv_block`` runs for these arguments, by name.

    Args:
        input, weight, arguments: as for ``conv_block``; the values of the tensors do not matter,
            bias does not either.

    Returns:
        "general": plain loops, for every argument and dtype; "direct" or "winograd": the fast
        kernels, which differ in the forward pass. "winograd" rounds differently: its errors are of
        the same size, not the same. On CUDA "direct" is for few input channels, "gemm" (implicit
        matrix product) for more.

    Raises:
        As ``conv_block``; TypeError for an argument that has another name.
    """
    check_tensor("conv_block_path", "input", input)
    check_tensor("conv_block_path", "weight", weight)
    names = "stride padding dilation groups activation pool_size pool_stride pool_padding ceil_mode"
    defaults = inspect.signature(conv_block).parameters
    if unknown := arguments.keys() - set(names.split()):
        raise TypeError(f"conv_block_path: unexpected arguments {sorted(unknown)}")
    full = {name: arguments.get(name, defaults[name].default) for name in names.split()}
    if input.dim() == 3:
        input = input.unsqueeze(0)
    if isinstance(full["padding"], str):
        padded = _pad_by_name(input, weight, full["padding"], full["stride"], full["dilation"])
        input, full["padding"] = padded
    input, weight, _ = _autocast(input, weight, None)
    path = _ops.conv_block_path(input, weight, *conv_block_arguments(**full), _allow_tf32(input))
    return _PATHS[path]


def _pad_by_name(input, weight, padding, stride, dilation):
    """padding="valid" or "same" as in conv2d: (input, padding in numbers)."""
    if padding == "valid":
        return input, 0
    if padding != "same":
        raise RuntimeError(f'conv_block: padding must be "valid", "same" or ints, got {padding!r}')
    if pair("stride", stride) != (1, 1):
        raise RuntimeError(f'conv_block: padding="same" needs stride 1, got {stride!r}')
    if input.dim() != 4 or weight.dim() != 4:
        return input, 0  # the op's own check says what is wrong
    dilation = pair("dilation", dilation)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    # An odd total puts the extra row or column at the end, as conv2d does.
    odd_h, odd_w = (t % 2 for t in total)
    if odd_h or odd_w:
        input = F.pad(input, (0, odd_w, 0, odd_h))
    return input, tuple(t // 2 for t in total)


def _autocast(input, weight, bias):
    """Casts that autocast to the active dtype asks for; float32 parameters stay as they are."""
    device_type = input.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t, keep):
        if t is None or not t.is_floating_point() or t.dtype in (torch.float64, *keep):
            return t
        return t.to(dtype)

    input, weight = cast(input, ()), cast(weight, (torch.float32,))
    if bias is not None and bias.dtype != weight.dtype and weight.dtype != torch.float64:
        bias = bias.to(weight.dtype)
    return input, weight, bias


def _empty_like_kernels(shape, like, weight=None):
    """A new 4D tensor as the kernels allocate it: in the memory format that `like` suggests.

    With one channel, which lies the same way in both formats, ``weight`` may ask for channels-last.
    """
    memory_format = torch._prims_common.suggest_memory_format(like)
    if weight is not None and like.shape[1] == 1 and memory_format == torch.contiguous_format:
        memory_format = torch._prims_common.suggest_memory_format(weight)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


@torch.library.register_fake("fastcls::conv_block_forward")
def _conv_block_forward_fake(
    input,
    weight,
    bias,
    stride,
    padding,
    dilation,
    groups,
    relu,
    pool_size,
    pool_stride,
    pool_padding,
    ceil_mode,
    save_winner,
    allow_tf32=False,
):
    check_fake_devices("conv_block", input, weight=weight, bias=bias)
    out = F.conv2d(input, weight.to(input.dtype), None, stride, padding, dilation, groups)
    if pool_size:
        out = F.max_pool2d(out, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    n, k, h, w = out.shape
    out = _empty_like_kernels((n, k, h, w), input, weight)
    window = pool_size[0] * pool_size[1] if pool_size else 1
    saved = save_winner and (relu or window > 1)
    dtype = torch.uint8 if window <= 255 else torch.int32
    return out, input.new_empty((n, h, w, k) if saved else (0,), dtype=dtype)


@torch.library.register_fake("fastcls::conv_block_backward")
def _conv_block_backward_fake(grad_out, input, weight, winner, *arguments_and_needs):
    need_input, need_weight, need_bias = arguments_and_needs[9:12]
    check_fake_devices(
        "conv_block_backward", input, grad_out=grad_out, weight=weight, winner=winner
    )
    return (
        _empty_like_kernels(input.shape, input) if need_input else input.new_empty((0,)),
        _empty_like_kernels(weight.shape, weight) if need_weight else weight.new_empty((0,)),
        weight.new_empty((weight.shape[0] if need_bias else 0,)),
    )


def _conv_block_forward(input, weight, bias, arguments, tf32):
    return _ops.conv_block_forward.default(input, weight, bias, *arguments, True, tf32)


def _save_conv_block(ctx, inputs, output):
    input, weight, bias, ctx.arguments, ctx.tf32 = inputs
    winner = output[1]
    ctx.mark_non_differentiable(winner)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight, bias, winner)


class _ConvBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _conv_block_forward(*inputs)
        _save_conv_block(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad_out, _):
        if grad_out is None:
            return (None,) * 5
        input, weight, _, winner = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = _differentiable_grads(ctx, grad_out)
        else:
            grads = _ops.conv_block_backward.default(
                grad_out, input, weight, winner, *ctx.arguments, *needs, ctx.tf32
            )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


class _TracedConvBlock(_ConvBlock):
    """torch.compile wants a setup_context; without one a Function is called faster."""

    forward = staticmethod(_conv_block_forward)
    setup_context = staticmethod(_save_conv_block)


def _differentiable_grads(ctx, grad_out):
    """Gradients of input, weight and bias as native ops of them, for double backward.

    The winners stay those of the forward pass: they are constants almost everywhere.
    """
    *tensors, winner = ctx.saved_tensors
    # Aliases: where one argument was computed from another, or two are the same tensor, the
    # gradient of one must not run through the other.
    input, weight, bias = (None if t is None else t.view_as(t) for t in tensors)
    parameters = _like_half(input, weight, bias)
    out = reference.conv_block_given_winner(input, *parameters, winner, ctx.arguments)
    needs = ctx.needs_input_grad[:3]
    wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
    return [next(grads) if need else None for need in needs]


def _exported(input, weight, bias, *arguments):
    return _conv_block(input, weight, bias, arguments)


define_exported(
    "conv_block(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool relu, int[] pool_size, int[] pool_stride, "
    "int[] pool_padding, bool ceil_mode) -> Tensor",
    _exported,
)
