"""FLOPs of the fused ops for ``torch.utils.flop_counter``: those of the dense convolutions.

As for PyTorch's own, a multiply-add counts two, and bias, ReLU, pool and loss count nothing. The
kernels may do fewer: they leave out what the pool throws away.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from fastcls import functional as functional  # defines the op of exported programs

_ops = torch.ops.fastcls


def _conv_flops(input, weight, stride, padding, dilation):
    """Of input (N, C, H, W) and weight (K, C / groups, kernel_h, kernel_w), by their shapes."""
    places = 1
    for size, kernel, step, pad, spread in zip(
        input[2:], weight[2:], stride, padding, dilation, strict=True
    ):
        places *= (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
    return 2 * input[0] * places * math.prod(weight)


@register_flop_formula([_ops.conv_block_forward, _ops.conv_block])
def _forward(input, weight, bias, stride, padding, dilation, *_, out_shape=None, **__):
    return _conv_flops(input, weight, stride, padding, dilation)


@register_flop_formula(_ops.conv_block_backward)
def _backward(grad_out, input, weight, winner, *arguments, out_shape=None, **_):
    stride, padding, dilation = arguments[:3]
    need_input, need_weight = arguments[9:11]  # behind the nine of the geometry
    return (need_input + need_weight) * _conv_flops(input, weight, stride, padding, dilation)


@register_flop_formula([_ops.cross_entropy_forward, _ops.cross_entropy_backward])
def _cross_entropy(*_, out_shape=None, **__):
    return 0
