"""The fused ops as modules: they own parameters and geometry, and make one call."""

import torch.fx
import torch.nn.functional as F
from torch import nn

from fastcls._arguments import conv_block_arguments
from fastcls.functional import conv_block, cross_entropy

# One node each in what torch.fx traces.
torch.fx.wrap("conv_block")
torch.fx.wrap("cross_entropy")


class FusedConvBlock(nn.Conv2d):
    """Conv2d → ReLU → MaxPool2d as one op with its own backward.

    An ``nn.Conv2d`` with three more steps inside: parameters, initial values under the same seed
    and ``state_dict`` keys are those of ``nn.Conv2d``.

    Args:
        in_channels ... padding_mode: as in ``torch.nn.Conv2d``.
        activation: "relu", or None to leave ReLU out.
        pool_size: int or (height, width) of the max-pool window; None leaves the pool out.
        pool_stride: default ``pool_size``.
        pool_padding, ceil_mode: as in ``torch.nn.MaxPool2d``.

    Shape: (N, C, H, W) or (C, H, W) → (N, K, out_h, out_w) or (K, out_h, out_w).

    See ``fastcls.functional.conv_block`` for dtypes, exact semantics and errors.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        *,
        activation="relu",
        pool_size=2,
        pool_stride=None,
        pool_padding=0,
        ceil_mode=False,
        device=None,
        dtype=None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        conv_block_arguments(
            1, 0, 1, 1, activation, pool_size, pool_stride, pool_padding, ceil_mode
        )
        self.activation = activation
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding
        self.ceil_mode = ceil_mode

    def forward(self, input):
        return self._block(conv_block, input, self.weight, self.bias)

    def _block(self, conv_block, input, weight, bias):
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv_block(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            ceil_mode=self.ceil_mode,
        )

    def extra_repr(self):
        text = f"{super().extra_repr()}, activation={self.activation!r}, pool_size={self.pool_size}"
        if self.pool_size is not None:
            if self.pool_stride is not None:
                text += f", pool_stride={self.pool_stride}"
            if self.pool_padding not in (0, (0, 0)):
                text += f", pool_padding={self.pool_padding}"
            if self.ceil_mode:
                text += ", ceil_mode=True"
        return text

    @classmethod
    def from_native(cls, conv, pool=None, *, activation="relu"):
        """The block that does conv → activation → pool, on the same Parameter objects.

        Args:
            conv: ``nn.Conv2d``, or a subclass of it with the same ``forward``.
            pool: ``nn.MaxPool2d`` without dilation and return_indices, or None for no pool.
            activation: "relu" or None.

        Raises:
            TypeError: conv or pool is of another class.
            ValueError: a pool with dilation or return_indices.
        """
        if not _does_a_convolution_only(conv):
            raise TypeError(f"from_native: conv must be nn.Conv2d, got {type(conv).__name__}")
        pooling = {"pool_size": None}
        if pool is not None:
            if not isinstance(pool, nn.MaxPool2d):
                raise TypeError(
                    f"from_native: pool must be nn.MaxPool2d, got {type(pool).__name__}"
                )
            if pool.dilation not in (1, (1, 1)) or pool.return_indices:
                raise ValueError(
                    "from_native: pool must have dilation 1 and return_indices False, got "
                    f"dilation {pool.dilation}, return_indices {pool.return_indices}"
                )
            pooling = {
                "pool_size": pool.kernel_size,
                "pool_stride": pool.stride,
                "pool_padding": pool.padding,
                "ceil_mode": pool.ceil_mode,
            }
        block = cls(*_conv_arguments(conv), activation=activation, **pooling, device="meta")
        block.weight, block.bias = conv.weight, conv.bias
        return block.train(conv.training)

    def to_native(self):
        """``nn.Sequential`` of Conv2d, ReLU and MaxPool2d on the same Parameter objects."""
        conv = nn.Conv2d(*_conv_arguments(self), device="meta")
        conv.weight, conv.bias = self.weight, self.bias
        layers = [conv]
        if self.activation is not None:
            layers.append(nn.ReLU())
        if self.pool_size is not None:
            layers.append(
                nn.MaxPool2d(
                    self.pool_size, self.pool_stride, self.pool_padding, ceil_mode=self.ceil_mode
                )
            )
        return nn.Sequential(*layers).train(self.training)


def _does_a_convolution_only(module):
    return isinstance(module, nn.Conv2d) and all(
        getattr(type(module), name) is getattr(nn.Conv2d, name)
        for name in ("forward", "_conv_forward")
    )


def _conv_arguments(conv):
    return (
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
    )


class FusedCrossEntropyLoss(nn.CrossEntropyLoss):
    """``nn.CrossEntropyLoss`` as one op with its own backward.

    Args: ``weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0``, as there.

    See ``fastcls.functional.cross_entropy`` for shapes, dtypes and errors.
    """

    def __init__(self, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0):
        super().__init__(
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    def forward(self, input, target):
        return cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )
