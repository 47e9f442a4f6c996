"""The fused ops where they are the faster ones, PyTorch's where those are."""

import torch
import torch.nn.functional as F

from fastcls import _C, functional
from fastcls._arguments import pair

# Measured with the layers of VGG-16, AlexNet and SqueezeNet in float32, those of training on two
# AVX2 cores, those of inference on two AVX-512 ones.
FEW_CHANNELS = 4  # of an image: next to no input to read again
MANY_CHANNELS = 64  # from there on the gradients of a map without a pool are as fast as a library's
LARGE_WEIGHT = 1 << 18  # elements; 1 MiB, beyond which preparing the weight takes its time
WINOGRAD_CHANNELS = 16  # the forward pass takes multiples of it by Winograd's algorithm

# Beyond these the op runs its general kernel, plain loops.
MOST_PLACES = 16  # of a window
MOST_ELEMENTS = 1 << 24  # of an image
HAS_VECTORS = _C.isa() != "scalar"
# There PyTorch's dense kernels multiply bfloat16 in pairs too; measured with the same layers and
# those of ResNet and YOLO on one core.
HAS_PAIRS = _C.isa() == "avx512_bf16"


def has_fast_kernel(input, pool_size, device_type, strided_grad=False):
    """Is there a kernel for these that is faster than plain loops?

    Args:
        As for ``conv_block_pays``.
    """
    height, width = (1, 1) if pool_size is None else pair("pool_size", pool_size)
    return (
        input.dtype != torch.float64
        and height * width <= MOST_PLACES
        and input.shape[-3] * input.shape[-2] * input.shape[-1] < MOST_ELEMENTS
        and (not strided_grad if device_type == "cuda" else HAS_VECTORS)
    )


def conv_block_pays(
    input,
    weight,
    pool_size,
    needs_grad,
    images=None,
    dense=True,
    device_type="cpu",
    strided_grad=False,
):
    """Is the fused op faster than conv2d, max_pool2d and relu_ one after the other?

    With a pool it is, but for a large weight that meets a small map. Without one its gradients are
    about as fast as a library's dense kernels; it wins on large maps, where it saves a pass over
    them, but not with pairs of bfloat16. Inference of 3 × 3 kernels goes by Winograd's algorithm,
    but for pairs.

    Args:
        input, weight: as for ``functional.conv_block``.
        pool_size: None for no pool.
        needs_grad: will a gradient be asked for?
        images: batch size to go by; None: input's.
        dense: are stride and dilation 1?
        device_type: where the op is to run.
        strided_grad: is the stride not 1, and will the input's gradient be asked for?
    """
    if not has_fast_kernel(input, pool_size, device_type, strided_grad):
        return False
    n = input.shape[0] if images is None else images
    places = n * input.shape[-2] * input.shape[-1]
    channels, taps = weight.shape[1], weight.numel() // weight.shape[0]
    pairs = HAS_PAIRS and is_bfloat16(input, device_type)
    tiles = dense and weight.shape[-2:] == (3, 3) and pool_size in (None, 2, (2, 2)) and not pairs
    if tiles and channels % WINOGRAD_CHANNELS == 0 and not needs_grad:
        return places >= taps // 8
    if pool_size is not None:
        enough = taps // (4 if pairs else 8) if needs_grad else taps
        return weight.numel() <= LARGE_WEIGHT or places >= enough
    if channels <= FEW_CHANNELS:
        return needs_grad or channels > 1
    return not pairs and places >= 4 * taps and (channels >= MANY_CHANNELS or not needs_grad)


def is_bfloat16(input, device_type):
    """Will the op see bfloat16 on the CPU, autocast counted in?"""
    if device_type != "cpu":
        return False
    if input.dtype == torch.float32 and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return input.dtype == torch.bfloat16


def is_one(step):
    """Is this stride or dilation 1 along both axes?"""
    return step in (1, (1, 1), [1, 1])


# Sizes are unknown while a graph for any batch size is made: reading them would tie it to some.
TYPICAL_IMAGES = 16


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
    """``functional.conv_block``, by whichever kernels are faster: the same numbers."""
    has_grads = torch.is_grad_enabled()
    needs_grad = has_grads and (input.requires_grad or weight.requires_grad)
    if input.dim() == 4 and conv_block_pays(
        input,
        weight,
        pool_size,
        needs_grad,
        TYPICAL_IMAGES if torch.compiler.is_compiling() else None,
        is_one(stride) and is_one(dilation),
        input.device.type,
        has_grads and input.requires_grad and not is_one(stride),
    ):
        return functional.conv_block(
            input,
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
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return relu_and_pool(out, activation, pool_size, pool_stride, pool_padding, ceil_mode)


def relu_and_pool(out, activation, pool_size, pool_stride, pool_padding, ceil_mode):
    """ReLU and max-pool of a map that nobody else sees.

    ReLU is monotone, so it may come after the pool, where there is less of it to do: the winner of
    a window stays the same, or its gradient is zero. It works in place: no backward pass before it
    reads the map. But what follows a pool may overwrite its result, which ReLU's backward pass
    reads; threshold's reads what it was given.
    """
    if pool_size is not None:
        out = F.max_pool2d(out, pool_size, pool_stride, pool_padding, ceil_mode=ceil_mode)
        if activation is not None and out.requires_grad:
            return F.threshold(out, 0.0, 0.0)
    return out if activation is None else F.relu_(out)


def fold_batch_norm(weight, bias, running_mean, running_var, gamma=None, beta=None, eps=1e-5):
    """Weight and bias of the convolution that does batch norm in evaluation too.

    γ (w·x + b − μ) / √(σ² + ε) + β = (w s)·x + (b − μ) s + β with s = γ / √(σ² + ε).

    Args:
        weight: (K, C / groups, kernel_h, kernel_w).
        bias: (K,) or None.
        running_mean, running_var: μ and σ², (K,).
        gamma, beta: (K,) or None for 1 and 0.

    Returns:
        New tensors with the dtype of ``weight``; gradients go through.
    """
    scale = torch.rsqrt(running_var + eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -running_mean if bias is None else bias - running_mean
    shift = shift * scale
    if beta is not None:
        shift = shift + beta
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def nll_of_log_softmax(input, target, weight=None, ignore_index=-100, reduction="mean", *, dim=1):
    """``nll_loss(log_softmax(input, dim), target, ...)`` in one op."""
    if target.is_floating_point() or not (dim == 1 or input.dim() <= 2):
        return F.nll_loss(
            F.log_softmax(input, dim), target, weight, None, ignore_index, None, reduction
        )
    return functional.cross_entropy(input, target, weight, ignore_index, reduction)
