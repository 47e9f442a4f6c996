"""What the ops ask of their tensors, and of the mode they are called in."""

import torch
from torch.autograd import forward_ad

HALF = (torch.bfloat16, torch.float16)


def check_tensor(op, name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def needs_grad(*tensors):
    for t in tensors:
        if t is not None and t.requires_grad:
            return torch.is_grad_enabled()
    return False


def decomposed():
    """Must an op be made of PyTorch's own?

    torch.func and forward-mode differentiation have rules for those only, ONNX has no other.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_fake_devices(op, input, **others):
    # A meta tensor next to a real one ends up in the fake, which must not answer.
    for name, t in others.items():
        if t is not None and t.device != input.device:
            raise RuntimeError(
                f"{op}: {name} must be on the device of input ({input.device}), got {t.device}"
            )
