"""The public functions. For each op: function, fake (shapes for tracing), backward."""

import torch
import torch.nn.functional as F

from fastcls import _load as _load
from fastcls import reference
from fastcls._arguments import conv_block_arguments

_ops = torch.ops.fastcls


def _check_tensor(op, name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def _needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---------------------------------------------------------------------------------- conv_block


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
            input, in which case its gradient is float32 too. Sums are float32 (float64 for float64).
        bias: (K,) with weight's dtype, or None.
        stride, padding, dilation: int or (height, width), as in ``torch.nn.functional.conv2d``;
            padding may also be "valid" or "same".
        groups: number of channel groups.
        activation: "relu", or None for no ReLU.
        pool_size: int or (height, width) of the max-pool window, or None for no pool.
        pool_stride: default ``pool_size``.
        pool_padding, ceil_mode: as in ``torch.nn.functional.max_pool2d``.

    Under autocast the op runs in the autocast dtype of the input's device; a float32 weight is
    read as it is, without a cast copy.

    Returns:
        (N, K, out_h, out_w), or (K, out_h, out_w): input's dtype and memory format.

    Raises:
        TypeError: an argument of the wrong Python type.
        RuntimeError: shapes, dtypes, devices or sizes that do not fit, named in the message.
        ValueError: unknown activation, or padding="same" with a stride.
    """
    _check_tensor("conv_block", "input", input)
    _check_tensor("conv_block", "weight", weight)
    if bias is not None:
        _check_tensor("conv_block", "bias", bias)
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
        stride, padding, dilation, groups, activation, pool_size, pool_stride, pool_padding, ceil_mode
    )
    input, weight, bias = _autocast(input, weight, bias)
    if _needs_grad(input, weight, bias):
        return _ConvBlock.apply(input, weight, bias, arguments)[0]
    return _ops.conv_block_forward(input, weight, bias, *arguments, False)[0]


def _pad_by_name(input, weight, padding, stride, dilation):
    """padding="valid" or "same" as in conv2d: (input, padding in numbers)."""
    if padding == "valid":
        return input, 0
    if padding != "same":
        raise ValueError(f'conv_block: padding must be "valid", "same" or ints, got {padding!r}')
    if stride not in (1, (1, 1), [1, 1]):
        raise ValueError(f'conv_block: padding="same" needs stride 1, got {stride!r}')
    dilation = (dilation, dilation) if isinstance(dilation, int) else dilation
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    # An odd total puts the extra row or column at the end, as conv2d does.
    odd_h, odd_w = (t % 2 for t in total)
    if odd_h or odd_w:
        input = F.pad(input, (0, odd_w, 0, odd_h))
    return input, tuple(t // 2 for t in total)


def _autocast(input, weight, bias):
    """Casts that autocast to the active dtype asks for; float32 parameters stay as they are."""
    device_type = input.device.type
    if not torch.is_autocast_enabled(device_type):
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
):
    out = F.conv2d(input, weight.to(input.dtype), None, stride, padding, dilation, groups)
    if pool_size:
        out = F.max_pool2d(out, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    n, k, h, w = out.shape
    memory_format = torch._prims_common.suggest_memory_format(input)
    out = input.new_empty((n, k, h, w)).contiguous(memory_format=memory_format)
    window = pool_size[0] * pool_size[1] if pool_size else 1
    saved = save_winner and (relu or window > 1)
    dtype = torch.uint8 if window <= 255 else torch.int32
    return out, input.new_empty((n, h, w, k) if saved else (0,), dtype=dtype)


@torch.library.register_fake("fastcls::conv_block_backward")
def _conv_block_backward_fake(
    grad_out, input, weight, winner, *arguments_and_needs
):
    *_, need_input, need_weight, need_bias = arguments_and_needs

    def like(t):
        memory_format = torch._prims_common.suggest_memory_format(t)
        return t.new_empty(t.shape).contiguous(memory_format=memory_format)

    return (
        like(input) if need_input else input.new_empty((0,)),
        like(weight) if need_weight else weight.new_empty((0,)),
        weight.new_empty((weight.shape[0] if need_bias else 0,)),
    )


class _ConvBlock(torch.autograd.Function):
    @staticmethod
    def forward(input, weight, bias, arguments):
        return _ops.conv_block_forward(input, weight, bias, *arguments, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, ctx.arguments = inputs
        winner = output[1]
        ctx.mark_non_differentiable(winner)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight, bias, winner)

    @staticmethod
    def backward(ctx, grad_out, _):
        if grad_out is None:
            return None, None, None, None
        input, weight, bias, winner = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = _differentiable_grads(ctx, grad_out)
        else:
            grads = _ops.conv_block_backward(
                grad_out, input, weight, winner, *ctx.arguments, *needs
            )
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def _differentiable_grads(ctx, grad_out):
    """Gradients of input, weight and bias as native ops of them, for double backward.

    The winners stay those of the forward pass: they are constants almost everywhere.
    """
    input, weight, bias, winner = ctx.saved_tensors
    same_dtype = weight.to(input.dtype)
    same_bias = None if bias is None else bias.to(input.dtype)
    out = reference.conv_block_given_winner(input, same_dtype, same_bias, winner, ctx.arguments)
    needs = ctx.needs_input_grad[:3]
    wanted = [t for t, need in zip((input, weight, bias), needs, strict=True) if need]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
    return [next(grads) if need else None for need in needs]
