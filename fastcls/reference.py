"""The fused ops in plain PyTorch: what they mean, what they are tested and measured against."""

import torch
import torch.nn.functional as F
from torch import nn

from fastcls._arguments import conv_block_arguments


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
    """``fastcls.functional.conv_block`` as conv2d, relu and max_pool2d."""
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if activation is not None:
        out = F.relu(out)
    if pool_size is not None:
        out = F.max_pool2d(out, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
    return out


def conv_block_given_winner(input, weight, bias, winner, arguments):
    """The conv block with its winners given: linear in each of input, weight and bias.

    Args:
        input, weight, bias: as in ``conv_block``; one dtype.
        winner: codes [N, out_h, out_w, K] from ``torch.ops.fastcls.conv_block_forward``.
        arguments: the op's geometry from ``conv_block_arguments``.
    """
    stride, padding, dilation, groups, _, pool_size, pool_stride, pool_padding, _ = arguments
    conv = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if winner.numel() == 0 and conv.numel() != 0:
        return conv
    (_, pool_w), (step_h, step_w) = pool_size or (1, 1), pool_stride or (1, 1)
    pad_h, pad_w = pool_padding or (0, 0)
    code = winner.permute(0, 3, 1, 2).long()
    shut = code == torch.iinfo(winner.dtype).max
    out_h, out_w = code.shape[2:]
    top = torch.arange(out_h, device=code.device) * step_h - pad_h
    left = torch.arange(out_w, device=code.device) * step_w - pad_w
    place = (top[:, None] + code // pool_w) * conv.shape[3] + left + code % pool_w
    place = place.masked_fill(shut, 0)  # its code names no place; what is read there is not used
    picked = conv.flatten(2).gather(2, place.flatten(2)).view(code.shape)
    return picked.masked_fill(shut, 0)


def cross_entropy(
    input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """``fastcls.functional.cross_entropy`` as PyTorch's own."""
    if not target.is_floating_point():
        target = target.long()
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


class NativeConvBlock(nn.Conv2d):
    """``FusedConvBlock`` in plain PyTorch calls: same arguments, same parameters, same numbers."""

    def __init__(
        self,
        *args,
        activation="relu",
        pool_size=2,
        pool_stride=None,
        pool_padding=0,
        ceil_mode=False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        # Checks the arguments that nn.Conv2d does not know.
        conv_block_arguments(
            1, 0, 1, 1, activation, pool_size, pool_stride, pool_padding, ceil_mode
        )
        self.activation = activation
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding
        self.ceil_mode = ceil_mode

    def forward(self, input):
        out = super().forward(input)
        if self.activation is not None:
            out = F.relu(out)
        if self.pool_size is not None:
            out = F.max_pool2d(
                out, self.pool_size, self.pool_stride, self.pool_padding, ceil_mode=self.ceil_mode
            )
        return out
