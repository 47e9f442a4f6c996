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


def exporting():
    """Is torch.export tracing, for a program of fastcls' ops?"""
    return torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export()


def define_exported(schema, call):
    """An op for exported programs, which is all of ``call``: it does what ``call`` would do there.

    The kernels' ops know no gradients: ``call`` adds them, and autocast and torch.func's rules, in
    Python. A program holds ops alone, so this one stands for the whole. Eager calls and
    torch.compile have no use for it, and do not pay for a kernel in Python.
    """
    name = schema.partition("(")[0]
    torch.library.define(f"fastcls::{name}", schema.removeprefix(name))
    op = getattr(torch.ops.fastcls, name).default

    def autograd(*arguments):
        if not _decomposing_a_program():
            return call(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # where the tracer sees it whole
            return op(*arguments)

    # CompositeImplicitAutograd would be one kernel for all, but torch.export warns of such ops.
    kernels = {"Autograd": autograd, "FuncTorchBatched": call, "CompositeExplicitAutograd": call}
    for key, kernel in kernels.items():
        torch.library.impl(f"fastcls::{name}", key, kernel)
    torch.library.register_fake(f"fastcls::{name}", call)


def _decomposing_a_program():
    """Is ``ExportedProgram.run_decompositions`` tracing? It asks for no gradients, but its program
    may be trained. AOTInductor traces in the same way, and does better with the kernels' ops.
    """
    if torch.is_grad_enabled() or not exporting():
        return False
    from torch._inductor.virtualized import V  # not for every import of fastcls

    return not getattr(V, "aot_compilation", False)


def check_fake_devices(op, input, **others):
    # A meta tensor next to a real one ends up in the fake, which must not answer.
    for name, t in others.items():
        if t is not None and t.device != input.device:
            raise RuntimeError(
                f"{op}: {name} must be on the device of input ({input.device}), got {t.device}"
            )
