"""The forward of one module as torch.fx graphs, children uncalled; or why there are none.

A trace sees one way through the Python code. It is taken for the whole only where nothing hides
another: it is repeated with tensors that say they are tensors and with ones that do not, with
optional arguments given and left at their defaults, in training mode and in evaluation mode.
"""

import contextlib
import inspect
import math
import operator
import random
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from fastcls.fusing.steps import changed_call


class CannotTrace(Exception):
    """The forward cannot be traced, or not with certainty; the message says why."""


@dataclass(eq=False)
class Traced:
    """One module's own forward in one mode. ``fixed``: why no new forward may be written from it.

    ``reads`` are the plain attributes whose values at the time of tracing are in the graph.
    """

    owner: nn.Module
    path: str
    graph: fx.Graph
    reads: frozenset[str] = frozenset()
    fixed: str | None = None


@dataclass
class _Watch:
    """What happened while a forward was traced that its graph does not show."""

    reads: set[str] = field(default_factory=set)
    fixed: str | None = None


def is_leaf(module: nn.Module) -> bool:
    """Is it called as a whole: PyTorch's own layers and ours, scripted modules?"""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if type(module).forward is nn.Sequential.forward:
        return False
    return type(module).__module__.startswith(("torch.nn.", "fastcls.modules"))


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def trace_both_modes(owner: nn.Module, path: str) -> tuple[Traced, Traced]:
    """``owner.forward`` in training and in evaluation; one object twice where they are the same.

    Raises:
        CannotTrace: see there.
    """
    if "forward" in vars(owner):
        raise CannotTrace(changed_call(owner))
    if type(owner).forward is nn.Sequential.forward:
        traced = _trace(owner, path)
        return traced, traced
    was_training = owner.training
    try:
        modes = []
        for owner.training in (True, False):  # not .train(): children stay as they are
            modes.append(_trace_certainly(owner, path))
    finally:
        owner.training = was_training
    train, evaluation = modes
    return (train, train) if code(train.graph) == code(evaluation.graph) else (train, evaluation)


def code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _trace_certainly(owner, path):
    parameters = list(inspect.signature(owner.forward).parameters.values())
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise CannotTrace("forward takes any number of arguments")
    traced = _trace(owner, path)
    try:
        plain = code(_trace(owner, path, say_tensor=False).graph)
    except CannotTrace:  # raised where a tensor is asked for
        plain = None
    if plain not in (None, code(traced.graph)):
        raise CannotTrace("forward asks for the type of its arguments")
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if defaults:
        without = _trace(owner, path, defaults)
        if _calls(without.graph) != _calls(traced.graph):
            raise CannotTrace("forward asks whether an optional argument was given")
    return traced


def _calls(graph):
    """Operations in order, without those that fx adds to check constant arguments."""
    checks = (torch._assert, operator.eq)
    return [
        (n.op, n.target)
        for n in graph.nodes
        if n.op not in ("placeholder", "output")
        and n.target not in checks
        and getattr(n.target, "__name__", "") != "_assert_is_none"
    ]


def _trace(owner, path, defaults=None, *, say_tensor=True):
    watch = _Watch()
    tracer = _Tracer(watch, say_tensor)
    before, rng = _attributes(owner), (random.getstate(), torch.get_rng_state())
    try:
        with _recording_reads(owner, watch), _noticing_saved_tensor_hooks(watch):
            graph = tracer.trace(owner, concrete_args=defaults)
    except Exception as error:  # whatever the forward does with a proxy
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotTrace(text[0]) from error
    finally:
        drew = random.getstate() != rng[0] or not torch.equal(torch.get_rng_state(), rng[1])
        random.setstate(rng[0])
        torch.set_rng_state(rng[1])
    if drew:
        raise CannotTrace("forward draws random numbers")
    if _attributes(owner) != before:
        watch.fixed = "forward changes attributes of the module"
    if isinstance(owner, fx.GraphModule):
        watch.fixed = "it is a torch.fx.GraphModule"
    for node in graph.nodes:
        if node.op == "call_function" and not _is_known_function(node.target):
            watch.fixed = f"forward calls {node.target.__name__}, which is wrapped for torch.fx"
    return Traced(owner, path, graph, frozenset(watch.reads), watch.fixed)


class _TensorProxy(fx.Proxy):
    """A proxy for which ``isinstance(proxy, torch.Tensor)`` holds."""

    @property
    def __class__(self):
        return torch.Tensor


class _Tracer(fx.Tracer):
    """Calls of children stay calls; what changes the meaning of later operations is noticed."""

    proxy_buffer_attributes = True

    def __init__(self, watch, say_tensor):
        super().__init__(autowrap_modules=())
        self.watch = watch
        self.proxy_class = _TensorProxy if say_tensor else fx.Proxy
        self.state = _global_state()

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def proxy(self, node):
        return self.proxy_class(node, self)

    def create_proxy(self, *args, **kwargs):
        if _global_state() != self.state:
            self.watch.fixed = "forward changes autocast or grad mode"
        return super().create_proxy(*args, **kwargs)

    def create_arg(self, a):
        if issubclass(type(a), fx.Proxy):  # whatever it says that it is
            return a.node
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            raise CannotTrace("forward makes a tensor of its own")
        return super().create_arg(a)


def _global_state():
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(d) for d in devices),
        *(torch.get_autocast_dtype(d) for d in devices),
    )


def _attributes(module):
    """Identity and length of everything that the module has: a change of either shows."""
    return {
        name: (id(value), len(value) if isinstance(value, (list, dict, set)) else None)
        for name, value in vars(module).items()
    }


def _is_known_function(target):
    home = getattr(target, "__module__", None) or type(target).__module__
    known = home.partition(".")[0] in ("torch", "_operator", "builtins", "math", "fastcls")
    return known or target in (getattr, math, operator)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | {"__dict__", "__class__"}


@contextlib.contextmanager
def _recording_reads(module, watch):
    """Names of the plain attributes that are read, in ``watch.reads``."""
    cls = type(module)

    def __getattribute__(self, name):
        value = cls.__getattribute__(self, name)
        plain = self is module and name not in _MODULE_ATTRIBUTES
        if plain and name in cls.__getattribute__(self, "__dict__"):
            watch.reads.add(name)
        return value

    module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": __getattribute__})
    try:
        yield
    finally:
        module.__class__ = cls


@contextlib.contextmanager
def _noticing_saved_tensor_hooks(watch):
    """Checkpointing without re-entry is such a hook: fx would trace through it and lose it."""
    hooks = torch.autograd.graph.saved_tensors_hooks
    enter = hooks.__enter__

    def noticed(self):
        watch.fixed = "forward uses saved-tensor hooks (checkpointing)"
        return enter(self)

    hooks.__enter__ = noticed
    try:
        yield
    finally:
        hooks.__enter__ = enter
