"""What one node of a torch.fx graph does, if it is a step of a chain that fastcls knows.

The same reading serves graphs whose layers are modules (``fuse``) and graphs of functions only
(``torch.compile``).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastcls.modules import FusedConvBlock, FusedCrossEntropyLoss

# Keys of a node's ``meta``: grad mode and autocast where they are not those of the forward's start;
# its value is still kept after the forward.
STATE, KEPT = "fastcls_state", "fastcls_kept"


class Step(NamedTuple):
    """A node, read.

    ``kind`` is the key of ``MODULES`` or ``FUNCTIONS``; ``arguments`` those of the function, by
    name, without the input (a module's come from its attributes); ``module`` is None for a
    function; ``refusal`` says why the step cannot be part of a fused chain.
    """

    kind: str
    name: str
    arguments: dict[str, Any]
    module: nn.Module | None = None
    refusal: str | None = None


# Each kind's arguments in the functions' order, with their defaults.
ARGUMENTS = {
    "conv": {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "batch_norm": {
        "running_mean": None,
        "running_var": None,
        "weight": None,
        "bias": None,
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
    },
    "relu": {"inplace": False},
    "max_pool": {
        "kernel_size": None,
        "stride": None,
        "padding": 0,
        "dilation": 1,
        "ceil_mode": False,
        "return_indices": False,
    },
    "log_softmax": {"dim": None, "_stacklevel": 3, "dtype": None},
    "nll_loss": {
        "target": None,
        "weight": None,
        "size_average": None,
        "ignore_index": -100,
        "reduce": None,
        "reduction": "mean",
    },
}
ARGUMENTS["cross_entropy"] = ARGUMENTS["nll_loss"] | {"label_smoothing": 0.0}

MODULES = {
    nn.Conv2d: "conv",
    nn.BatchNorm2d: "batch_norm",
    nn.ReLU: "relu",
    nn.MaxPool2d: "max_pool",
    nn.LogSoftmax: "log_softmax",
    nn.NLLLoss: "nll_loss",
    nn.CrossEntropyLoss: "cross_entropy",
}
FUNCTIONS = {
    F.conv2d: "conv",
    F.batch_norm: "batch_norm",
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.max_pool2d: "max_pool",
    F.max_pool2d_with_indices: "max_pool",
    torch.max_pool2d: "max_pool",
    F.log_softmax: "log_softmax",
    torch.log_softmax: "log_softmax",
    F.nll_loss: "nll_loss",
    F.cross_entropy: "cross_entropy",
}
# torch.log_softmax and the method have dtype where F.log_softmax has _stacklevel.
SHORT_LOG_SOFTMAX = {"dim": None, "dtype": None}
METHODS = {"relu": "relu", "relu_": "relu", "log_softmax": "log_softmax"}
# Arguments that are tensors; all others must be constants for a chain to be proved equal.
TENSORS = {"weight", "bias", "running_mean", "running_var", "target"}


def input_of(node: fx.Node) -> Any:
    """The tensor that a step of any kind works on."""
    return node.args[0] if node.args else node.kwargs.get("input")


def read(node: fx.Node, owner: nn.Module) -> Step | None:
    """The step that ``node`` is, or None. ``owner`` has the modules that the graph calls."""
    if node.op == "call_module":
        return read_module(owner.get_submodule(node.target), node.target)
    if node.op == "call_function":
        kind = FUNCTIONS.get(node.target)
    else:
        kind = METHODS.get(node.target) if node.op == "call_method" else None
    return None if kind is None else _read_function(node, kind)


def read_module(module: nn.Module, name: str) -> Step | None:
    for cls, kind in MODULES.items():
        if isinstance(module, cls):
            # A module's mode is asked for when it runs; its tensors may be computed when read.
            names = [a for a in ARGUMENTS[kind] if a not in {*TENSORS, "training"}]
            arguments = {a: getattr(module, a) for a in names if hasattr(module, a)}
            refusal = module_refusal(module, cls) or _refusal(kind, arguments)
            if kind == "batch_norm" and module.running_mean is None:
                refusal = "batch norm keeps no running statistics"
            return Step(kind, name, arguments, module, refusal)
    return None


ALREADY = "fused already"


def module_refusal(module: nn.Module, cls: type) -> str | None:
    """Why a call of ``module`` may do more than ``cls.forward``; None if it does just that."""
    if type(module) in (FusedConvBlock, FusedCrossEntropyLoss):
        return ALREADY
    if nn.utils.parametrize.is_parametrized(module):
        return f"{cls.__name__} is parametrized"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{type(module).__name__} has no weight before the model has run once"
    if type(module) is not cls:
        return f"{type(module).__name__} is a {cls.__name__} of its own kind"
    return changed_call(module)


def changed_call(module: nn.Module) -> str | None:
    """Hooks on a module, or a ``forward`` of the instance: a call does more than its class says."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return f"{type(module).__name__} has hooks"
    if any(getattr(nn.modules.module, f"_global{name}") for name in hooks):
        return "there are hooks on all modules"
    if calls_itself(module):
        return f"{type(module).__name__} has a __call__ of its own"
    if "forward" in vars(module):
        return f"forward of this {type(module).__name__} was replaced"
    return None


def calls_itself(module: nn.Module) -> bool:
    """Does its class do more than ``forward`` when it is called?"""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(
        module, (fx.GraphModule, torch.jit.ScriptModule)
    )


def _read_function(node: fx.Node, kind: str) -> Step:
    defaults = ARGUMENTS[kind]
    if kind == "log_softmax" and node.target is not F.log_softmax:
        defaults = SHORT_LOG_SOFTMAX
    given = dict(zip(["input", *defaults], node.args, strict=False)) | dict(node.kwargs)
    name = node.target if node.op == "call_method" else kind
    if kind == "max_pool":
        name = "max_pool2d"
    elif kind == "conv":
        name = "conv2d"
    arguments = {a: given.get(a, default) for a, default in defaults.items()}
    refusal = _refusal(kind, arguments)
    if unknown := given.keys() - defaults.keys() - {"input"}:
        refusal = f"{name} with unknown arguments {sorted(unknown)}"
    if node.target is F.max_pool2d_with_indices:  # a pair of results, whatever is asked for
        refusal = "max_pool2d returns indices"
    for argument, value in arguments.items():
        if argument not in TENSORS and _has_node(value):
            refusal = f"{argument} of {name} is computed in forward"
    return Step(kind, name, arguments, None, refusal)


def _has_node(value) -> bool:
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(v, (fx.Node, torch.SymInt, torch.SymFloat)) for v in values)


def _refusal(kind: str, arguments: dict[str, Any]) -> str | None:
    """Arguments with which the fused op has no equal, or none that is fast."""
    if kind == "conv" and arguments["groups"] != 1:
        return "grouped convolutions have no fast kernel"
    if kind == "batch_norm" and arguments.get("training"):
        return "batch_norm in training"
    if kind == "max_pool":
        if arguments["dilation"] not in (1, (1, 1), [1, 1]):
            return f"max-pool has dilation {arguments['dilation']}"
        if arguments["return_indices"]:
            return "max-pool returns indices"
    if kind == "log_softmax" and (arguments["dim"] not in (1, -1) or arguments.get("dtype")):
        return "log_softmax over a dimension other than the classes', or with a dtype of its own"
    if kind in ("nll_loss", "cross_entropy") and (
        arguments.get("size_average") is not None or arguments.get("reduce") is not None
    ):
        return f"{kind} with the deprecated size_average or reduce"
    return None
