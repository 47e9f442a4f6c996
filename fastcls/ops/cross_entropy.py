"""cross_entropy: the functions, their fakes (shapes for tracing), their backward."""

import functools
import math

import torch

from fastcls import _load as _load
from fastcls import reference
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
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as PyTorch's own ops number them
_plain_cross_entropy, _is_one = _load._C.cross_entropy_plain, _load._C.is_one
_SAVE_NOTHING, _SAVE_ROWS, _SAVE_GRAD = 0, 1, 2  # csrc/cross_entropy.h says what they are


def cross_entropy(
    input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """Softmax cross-entropy in one op, with its own backward.

    Equal to ``torch.nn.functional.cross_entropy``, corner cases included: the mean over nothing is
    NaN, −inf logits give what they give there. Log-probabilities are never stored. What is kept for
    the backward pass besides the arguments is the gradient itself, which the forward pass writes on
    its way, or two numbers per row: in float16, in compiled graphs and for few logits on CUDA.
    Arithmetic is float32 (float64 for float64), whatever the dtype of the logits.

    Args:
        input: logits (C), (N, C) or (N, C, d1, ...); float32, float64, bfloat16 or float16; any
            strides.
        target: class indices of any integer dtype, () or (1,), (N), (N, d1, ...), each in [0, C) or
            ``ignore_index``; or class probabilities of input's shape.
        weight: (C,), one factor per class, or None; input's dtype, or float32 with half-precision
            logits.
        ignore_index: rows with this class index add nothing to loss, mean or gradient; their
            gradient is 0 even where their logits are NaN.
        reduction: "mean" (weighted with class indices, over rows with probabilities), "sum" or
            "none".
        label_smoothing: share of the target that is spread evenly over the classes, at most 1.

    Under autocast, to any dtype, the loss is float32 from half-precision logits read as they are;
    else it has input's dtype. Dtypes promote with class probabilities as in PyTorch.

    Gradients with respect to probabilities or to their weight, and gradients of gradients, go
    through PyTorch's own ops.

    Returns:
        A scalar, or with reduction "none" one loss per row: (), (N) or (N, d1, ...).

    Raises:
        TypeError: an argument of the wrong Python type.
        ValueError: unknown reduction, or a target of another batch size.
        IndexError: on the CPU, a class index outside [0, C). On CUDA, where finding out would make
            the host wait, loss and gradient of such a row are NaN.
        RuntimeError: shapes, dtypes or devices that do not fit, named in the message.
    """
    if weight is None and not torch.compiler.is_compiling():
        code = _REDUCTIONS.get(reduction, 0) if isinstance(reduction, str) else 0
        settings = (ignore_index, code, label_smoothing)
        plain = _plain_cross_entropy(input, target, *settings)
        if plain is not None:
            loss, grad = plain
            return loss if grad is None else _apply_plain(input, (target, settings, loss, grad))
    return _cross_entropy(
        input, target, weight, ignore_index, reduction, label_smoothing, count_hits=False
    )


def cross_entropy_with_hits(
    input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    """``cross_entropy`` and the number of right predictions, from the same pass over the logits.

    Args: as for ``cross_entropy``; target holds class indices.

    Returns:
        (loss, hits). hits: int64 scalar on input's device, the number of rows whose greatest logit
        is that of the target: ``(input.argmax(1) == target).sum()`` without the ignored rows and
        without those that have a NaN. Of equal logits the first counts, as in ``argmax``.

    Raises:
        As ``cross_entropy``; RuntimeError for class probabilities.
    """
    return _cross_entropy(
        input, target, weight, ignore_index, reduction, label_smoothing, count_hits=True
    )


def _cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, *, count_hits):
    check_tensor("cross_entropy", "input", input)
    check_tensor("cross_entropy", "target", target)
    if weight is not None:
        check_tensor("cross_entropy", "weight", weight)
    code = _REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        raise ValueError(
            f'cross_entropy: reduction must be "none", "mean" or "sum", got {reduction!r}'
        )
    settings = (ignore_index, code, label_smoothing)
    try:
        traced = torch.compiler.is_compiling()
        if traced and exporting():
            op = _ops.cross_entropy_with_hits if count_hits else _ops.cross_entropy
            return op.default(input, target, weight, *settings)
        return _cross_entropy_by_code(input, target, weight, settings, count_hits, traced)
    except RuntimeError as error:
        raise _in_native_type(error, ignore_index, label_smoothing) from None


def _cross_entropy_by_code(input, target, weight, settings, count_hits, traced):
    """The loss, or loss and hits; traced: by what compilers can follow."""
    if count_hits and needs_grad(weight):
        raise RuntimeError(
            "cross_entropy_with_hits: weight must not require a gradient beside class indices"
        )
    if not count_hits and (needs_grad(target, weight) or decomposed()):
        return _reference(input, target, weight, *settings)
    float_loss = input.dtype in HALF and _autocast_active(input)
    if target.is_floating_point():
        input, target, weight, promoted = _promote_probabilities(input, target, weight)
        float_loss = float_loss or promoted
    if not (input.requires_grad and torch.is_grad_enabled()):
        loss, _, hits = _ops.cross_entropy_forward.default(
            input, target, weight, *settings, float_loss, _SAVE_NOTHING, count_hits
        )
        return (loss, hits) if count_hits else loss
    if traced:
        outputs = _TracedCrossEntropy.apply(
            input, target, weight, *settings, float_loss, count_hits
        )
        return (outputs[0], outputs[2]) if count_hits else outputs[0]
    return _CrossEntropy.apply(input, (target, weight, settings, float_loss, count_hits))


def _reference(input, target, weight, ignore_index, code, label_smoothing):
    reduction = next(name for name, value in _REDUCTIONS.items() if value == code)
    return reference.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)


def _in_native_type(error, ignore_index, label_smoothing):
    """The error of the type that PyTorch raises for the same mistake."""
    text = str(error)
    if "target must have batch size" in text:
        return ValueError(text)
    if "Expected a value of type 'int' for argument 'ignore_index'" in text:
        return TypeError(f"cross_entropy: ignore_index must be an int, got {ignore_index!r}")
    if "Expected a value of type 'float' for argument 'label_smoothing'" in text:
        return TypeError(f"cross_entropy: label_smoothing must be a float, got {label_smoothing!r}")
    return error


def _autocast_active(input):
    device_type = input.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _promote_probabilities(input, target, weight):
    """input, target and weight in the dtypes that the op takes; does the loss become float32?"""
    dtype = torch.promote_types(input.dtype, target.dtype)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    if not (input.is_floating_point() and dtype.is_floating_point):
        return input, target, weight, False  # the op's own check says what is wrong
    if dtype == input.dtype:
        kept = weight if weight is None or weight.dtype == dtype else weight.to(dtype)
        return input, target.to(dtype), kept, False
    if dtype == torch.float32 and input.dtype in HALF:  # half logits are read as they are
        if target.dtype != input.dtype:
            target = target.float()
        if weight is not None and weight.dtype != input.dtype:
            weight = weight.float()
        return input, target, weight, True
    return input.to(dtype), target.to(dtype), None if weight is None else weight.to(dtype), False


@torch.library.register_fake("fastcls::cross_entropy_forward")
def _cross_entropy_forward_fake(
    input, target, weight, ignore_index, reduction, label_smoothing, float_loss, save, count_hits
):
    check_fake_devices("cross_entropy", input, target=target, weight=weight)
    batch = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    loss = input.new_empty(() if reduction else batch, dtype=wide if float_loss else input.dtype)
    saved = torch.empty_like(input) if save == _SAVE_GRAD else None
    if save == _SAVE_ROWS:
        rows = 1
        for size in batch:
            rows = rows * size
        saved = input.new_empty((2 * rows + 1,), dtype=wide)
    return loss, saved, input.new_empty((), dtype=torch.int64) if count_hits else None


@torch.library.register_fake("fastcls::cross_entropy_backward")
def _cross_entropy_backward_fake(
    grad_loss, input, target, weight, saved, ignore_index, reduction, label_smoothing
):
    return torch.empty_like(input)


@torch.library.register_fake("fastcls::cross_entropy_scale_")
def _cross_entropy_scale_fake(grad, grad_loss, target, ignore_index):
    return None


# Logits on CUDA of so many bytes do not stay in the second-level cache until the backward pass. For
# fewer it is the launches that count, and the gradient takes two more than two numbers per row do:
# the mean's divisor has to be known before, the scale comes after.
_ONE_READ_BYTES = 32 << 20
_FEW_CLASSES = 32  # csrc/cuda/cross_entropy_few.h


def _on_cuda(input):
    return input.is_cuda


def _save_of(input, target, weight, settings):
    """What the forward op is to save: the gradient wherever that saves time."""
    if input.dtype == torch.float16:
        return _SAVE_ROWS
    if not _on_cuda(input):
        return _SAVE_GRAD if input.is_cpu else _SAVE_ROWS
    _, reduction, smoothing = settings
    served = (
        input.dtype != torch.float64
        and input.dim() > 1
        and input.stride(1) == 1
        and input.size(1) > _FEW_CLASSES
        and not target.is_floating_point()
        and reduction != _REDUCTIONS["none"]
        and (weight is None or not smoothing > 0)
    )
    return _SAVE_GRAD if served and input.nbytes >= _ONE_READ_BYTES else _SAVE_ROWS


class _CrossEntropy(torch.autograd.Function):
    """Saves the gradient itself where the forward pass has written it along with the loss.

    The first backward pass scales it in place and gives it away; the memory is freed with it.
    Further ones (``retain_graph=True``) compute it again. In float16 a gradient that has not met
    the loss scale yet would underflow: there the backward pass reads the logits again.
    """

    @staticmethod
    def forward(ctx, input, call):
        target, weight, settings, float_loss, count_hits = call
        save = _save_of(input, target, weight, settings)
        # The overload itself: finding it among the op's overloads takes as long as a small tensor.
        loss, saved, hits = _ops.cross_entropy_forward.default(
            input, target, weight, *settings, float_loss, save, count_hits
        )
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.save = settings, save
        if save == _SAVE_GRAD:
            # The target beside those saved: logits that were changed do not matter to it.
            ctx.unit_grad, ctx.target = saved, target
            ctx.save_for_backward(input, target, weight)
        else:
            ctx.save_for_backward(input, target, weight, saved)
        if not count_hits:
            return loss
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if _is_one(grad_loss) and "unit_grad" in ctx.__dict__ and not torch.is_grad_enabled():
            return ctx.__dict__.pop("unit_grad"), None
        if grad_loss is None:
            return None, None
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_cross_entropy_grad(ctx, grad_loss), None
        if ctx.save == _SAVE_ROWS:
            return _grad_from_logits(ctx, grad_loss), None
        grad = ctx.__dict__.pop("unit_grad", None)
        if grad is None:  # not the first pass
            grad = _save_again(ctx, _SAVE_GRAD)
        if _is_batched(grad_loss):
            return grad * _per_logit(_of_rows(ctx, grad_loss)), None
        if _on_cuda(grad):  # on the device: the host would have to wait for grad_loss
            target, ignore_index = ctx.saved_tensors[1], ctx.settings[0]
            _ops.cross_entropy_scale_.default(grad, grad_loss, target, ignore_index)
            return grad, None
        if type(grad_loss) is torch.Tensor and grad_loss.is_cpu and grad_loss.dim() == 0:
            scale = grad_loss.item()
            if scale == 1:
                return grad, None
            if not math.isfinite(scale):  # 0 * inf would not leave the ignored rows 0
                return _grad_from_logits(ctx, grad_loss), None
            return grad.mul_(grad_loss), None
        return grad.mul_(_per_logit(_of_rows(ctx, grad_loss))), None


class _PlainCrossEntropy(_CrossEntropy):
    """The same for a loss and a gradient that are there already."""

    @staticmethod
    def forward(ctx, input, call):
        ctx.target, ctx.settings, loss, ctx.unit_grad = call
        ctx.save = _SAVE_GRAD
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, ctx.target, None)
        return loss


# Function.apply without its own wrapper, which is there for torch.func: a microsecond.
_apply_plain = super(torch.autograd.Function, _PlainCrossEntropy).apply


def _is_batched(grad_loss):
    """Several gradients at once: is_grads_batched=True, or a backward pass within torch.vmap."""
    legacy = torch._C._functorch.is_legacy_batchedtensor(grad_loss)
    return legacy or torch._C._functorch.is_batchedtensor(grad_loss)


def _of_rows(ctx, grad_loss):
    """The gradient of each row's loss: 0 for the ignored ones, which 0 * inf would not leave 0."""
    if ctx.target.is_floating_point():
        return grad_loss
    ignored = ctx.target.long() == ctx.settings[0]
    return grad_loss.expand(ignored.shape).masked_fill(ignored, 0)


def _per_logit(grad_loss):
    """The gradient of each row's loss, or of all rows', in a shape that multiplies the logits."""
    return grad_loss.unsqueeze(1) if grad_loss.dim() > 0 else grad_loss


def _grad_from_logits(ctx, grad_loss):
    input, target, weight, *rows = ctx.saved_tensors
    saved = rows[0] if rows else _save_again(ctx, _SAVE_ROWS)
    return _ops.cross_entropy_backward(grad_loss, input, target, weight, saved, *ctx.settings)


def _save_again(ctx, save):
    input, target, weight, *_ = ctx.saved_tensors
    arguments = (input, target, weight, *ctx.settings, False, save, False)
    return _ops.cross_entropy_forward(*arguments)[1]


class _TracedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(input, target, weight, *arguments):
        *settings, count_hits = arguments
        outputs = _ops.cross_entropy_forward(
            input, target, weight, *settings, _SAVE_ROWS, count_hits
        )
        return outputs if count_hits else outputs[:2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, weight, *settings, _, _ = inputs
        ctx.settings = settings
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, target, weight, output[1])

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            grad = None
        elif torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grad = _differentiable_cross_entropy_grad(ctx, grad_loss)
        else:
            grad = _grad_from_logits(ctx, grad_loss)
        return grad, *[None] * 7


def _differentiable_cross_entropy_grad(ctx, grad_loss):
    """The gradient of input as native ops of input and grad_loss, for double backward."""
    input, target, weight, *_ = ctx.saved_tensors
    dtype = torch.promote_types(input.dtype, torch.float32)
    if target.is_floating_point():
        target = target.to(dtype)
    weight = None if weight is None else weight.to(dtype)
    loss = _reference(input.to(dtype), target, weight, *ctx.settings)
    return torch.autograd.grad(loss, input, grad_loss.to(loss.dtype), create_graph=True)[0]


def _exported(input, target, weight, *settings, count_hits=False):
    return _cross_entropy_by_code(input, target, weight, settings, count_hits, traced=True)


_ARGUMENTS = (
    "(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
    "float label_smoothing)"
)
define_exported(f"cross_entropy{_ARGUMENTS} -> Tensor", _exported)
define_exported(
    f"cross_entropy_with_hits{_ARGUMENTS} -> (Tensor loss, Tensor hits)",
    functools.partial(_exported, count_hits=True),
)
