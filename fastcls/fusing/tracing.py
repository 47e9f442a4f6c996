"""The forward of one module as torch.fx graphs, children uncalled; or why there are none.

A trace sees one way through the Python code. It is taken for the whole only where nothing hides
another: it is repeated with tensors that say they are tensors and with ones that do not, with
optional arguments given and left at their defaults, in training mode and in evaluation mode, with
the children in the other mode, gradients off and autocast on.
"""

import builtins
import contextlib
import dis
import enum
import functools
import gc
import inspect
import itertools
import math
import operator
import random
import sys
import types
import weakref
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcls.fusing.steps import KEPT, STATE, calls_itself, changed_call


class CannotTrace(Exception):
    """The forward cannot be traced, or not with certainty; the message says why."""


@dataclass(eq=False)
class Traced:
    """One module's own forward in one mode. ``fixed``: why no new forward may be written from it.

    ``reads`` are the plain attributes whose values at the time of tracing are in the graph;
    ``unsure``: why the graph may become another one unseen, so that none of its steps may change.
    """

    owner: nn.Module
    path: str
    graph: fx.Graph
    reads: frozenset[str] = frozenset()
    fixed: str | None = None
    unsure: str | None = None


@dataclass
class _Watch:
    """What happened while a forward was traced that its graph does not show."""

    reads: set[str] = field(default_factory=set)
    fixed: str | None = None
    unsure: str | None = None


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
        for mode in (True, False):
            vars(owner)["training"] = mode  # not .train(): children stay as they are
            with torch.inference_mode(False), _global_modes(grad=True, autocast=False):
                modes.append(_trace_certainly(owner, path))
            with _below_in_the_other_mode(owner), _global_modes(grad=False, autocast=True):
                _add_what_shows(modes[-1], _trace(owner, path))
    finally:
        vars(owner)["training"] = was_training
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
    # All left out, and all but one.
    left_out = [defaults] if defaults else []
    if len(defaults) > 1:
        left_out += [{k: v for k, v in defaults.items() if k != name} for name in defaults]
    for constants in left_out:
        if not _is_same(traced.graph, _trace(owner, path, constants).graph, constants):
            raise CannotTrace("forward asks whether an optional argument was given")
    return traced


def _add_what_shows(traced, switched):
    """Changes of grad mode and autocast that are none in the state that ``traced`` began in."""
    if code(switched.graph) != code(traced.graph):
        raise CannotTrace("forward goes by the mode of its children, of gradients or of autocast")
    traced.fixed, traced.unsure = traced.fixed or switched.fixed, traced.unsure or switched.unsure
    for node, twin in zip(traced.graph.nodes, switched.graph.nodes, strict=True):
        if STATE in twin.meta:
            node.meta[STATE] = node.meta.get(STATE), twin.meta[STATE]


_AUTOCAST_DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def _global_modes(grad, autocast):
    before = [torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES]
    for device in _AUTOCAST_DEVICES:
        torch.set_autocast_enabled(device, autocast)
    try:
        with torch.set_grad_enabled(grad):
            yield
    finally:
        for device, enabled in zip(_AUTOCAST_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


@contextlib.contextmanager
def _below_in_the_other_mode(owner):
    below = [m for m in owner.modules() if m is not owner]
    modes = [m.training for m in below]
    try:
        for module in below:
            vars(module)["training"] = not module.training
        yield
    finally:
        for module, mode in zip(below, modes, strict=True):
            vars(module)["training"] = mode


def _is_same(graph, without, defaults):
    """Do the graphs differ only in that the arguments of ``defaults`` are constants in the second?

    That one also has operations with which fx checks the constants.
    """
    checks = (torch._assert, operator.eq)
    steps, others = (
        [
            n
            for n in g.nodes
            if n.op != "placeholder"
            and n.target not in checks
            and getattr(n.target, "__name__", "") != "_assert_is_none"
        ]
        for g in (graph, without)
    )
    twins = {n: n.target for g in (graph, without) for n in g.nodes if n.op == "placeholder"}

    def same(a, b):
        if isinstance(a, fx.Node):
            if a.op == "placeholder" and a.target in defaults:
                default = defaults[a.target]
                return b is default or (type(b) is type(default) and b == default)
            return isinstance(b, fx.Node) and twins[a] == twins[b]
        if type(a) is not type(b):
            return False
        if isinstance(a, (tuple, list)):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict):
            return list(a) == list(b) and all(map(same, a.values(), b.values()))
        if isinstance(a, slice):
            return all(map(same, (a.start, a.stop, a.step), (b.start, b.stop, b.step)))
        return a == b

    for number, (a, b) in enumerate(zip(steps, others, strict=False)):
        if (a.op, a.target) != (b.op, b.target):
            return False
        if not (same(a.args, b.args) and same(dict(a.kwargs), dict(b.kwargs))):
            return False
        twins[a] = twins[b] = number
    return len(steps) == len(others)


def _trace(owner, path, defaults=None, *, say_tensor=True):
    watch = _Watch()
    tracer = _Tracer(watch)
    attributes, generators = _Contents(owner), _Generators()
    data = [(t, t.data) for t in itertools.chain(owner.parameters(), owner.buffers())]
    collects = gc.isenabled()
    gc.disable()
    try:
        with (
            _recording_reads(owner, watch),
            _noticing_saved_tensor_hooks(watch),
            _answering_for_proxies(say_tensor),
            _noticing_types_asked_for(owner),
            _RefusingWrites(),
        ):
            graph = tracer.trace(owner, concrete_args=defaults)
    except Exception as error:  # whatever the forward does with a proxy
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotTrace(text[0]) from error
    finally:
        drew = generators.have_moved()
        generators.restore()
        if attributes.are_changed():
            watch.fixed = "forward changes attributes of the module"
        kept = tracer.kept()
        attributes.restore()
        if collects:
            gc.enable()
        exchanged = [(t, old) for t, old in data if not torch._C._is_alias_of(t, old)]
        for tensor, old in exchanged:
            tensor.data = old
    if exchanged:
        raise CannotTrace("forward gives a parameter or buffer other data")
    if drew:
        raise CannotTrace("forward draws random numbers")
    for node in kept:
        node.meta[KEPT] = True
        watch.fixed = "forward keeps tensors"
    if isinstance(owner, fx.GraphModule):
        watch.fixed = "it is a torch.fx.GraphModule"
    for node in graph.nodes:
        if node.op == "call_module" and calls_itself(owner.get_submodule(node.target)):
            raise CannotTrace(f"forward calls {node.target}, which has a __call__ of its own")
        node.type = None  # annotations may be of any kind; a new forward keeps the old one's
        if node.op == "call_function" and not _is_known_function(node.target):
            watch.fixed = f"forward calls {node.target.__name__}, which is wrapped for torch.fx"
    return Traced(owner, path, graph, frozenset(watch.reads), watch.fixed, watch.unsure)


class _RefusingWrites(TorchDispatchMode):
    """Of proxies it sees nothing; what is written to is a tensor of the user's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            raise CannotTrace(f"forward writes to tensors ({func})")
        return func(*args, **(kwargs or {}))


class _Proxy(fx.Proxy):
    def __setattr__(self, name, value):
        if name not in ("node", "tracer"):
            raise CannotTrace(f"forward sets {name} of a tensor")
        super().__setattr__(name, value)


_PROXIES = (fx.Proxy, _Proxy, fx.proxy.Attribute)


class _Tracer(fx.Tracer):
    """Calls of children stay calls; what changes the meaning of later operations is noticed."""

    proxy_buffer_attributes = True

    def __init__(self, watch):
        super().__init__(autowrap_modules=())
        self.watch = watch
        self.state = _global_state()
        self.proxies = []

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def proxy(self, node):
        proxy = _Proxy(node, self)
        self.proxies.append((weakref.ref(proxy), node))
        return proxy

    def kept(self):
        """Nodes of which somebody still has the proxy, now that ``forward`` has returned."""
        if any(proxy() is not None for proxy, _ in self.proxies):
            gc.collect(0)  # they are young: nothing was collected while the forward was traced
        return [node for proxy, node in self.proxies if proxy() is not None]

    def create_proxy(self, *args, **kwargs):
        proxy = super().create_proxy(*args, **kwargs)
        if (state := _global_state()) != self.state:
            self.watch.fixed = "forward changes autocast or grad mode"
            proxy.node.meta[STATE] = state
        return proxy

    def create_arg(self, a):
        if type(a) in _PROXIES:
            return a.node
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            raise CannotTrace("forward makes a tensor of its own")
        if isinstance(a, dict) and type(a) is not dict:
            self.watch.fixed = f"forward makes a {type(a).__name__}"
        if isinstance(a, float):  # NumPy's say what they are in a way that is no Python
            a = float(a)
        return super().create_arg(a)


def _global_state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES),
        *(torch.get_autocast_dtype(d) for d in _AUTOCAST_DEVICES),
    )


class _Generators:
    """States of the generators of random numbers: Python's, PyTorch's, NumPy's if it is used."""

    def __init__(self):
        self.numpy = getattr(sys.modules.get("numpy"), "random", None)
        self.before = self._states()

    def _states(self):
        numpy = None
        if self.numpy is not None:
            name, keys, *position = self.numpy.get_state()
            numpy = (name, tuple(keys.tolist()), *position)
        return random.getstate(), tuple(torch.get_rng_state().tolist()), numpy

    def have_moved(self):
        return self._states() != self.before

    def restore(self):
        if not self.have_moved():
            return
        python, pytorch, numpy = self.before
        random.setstate(python)
        torch.set_rng_state(torch.tensor(pytorch, dtype=torch.uint8))
        if numpy is not None:
            self.numpy.set_state(numpy)


class _Contents:
    """What a module's attributes are and hold, in lists, dicts and sets of any depth."""

    def __init__(self, module):
        self.saved = {}
        self._save(vars(module))

    def _save(self, value):
        if isinstance(value, (list, dict, set)) and id(value) not in self.saved:
            self.saved[id(value)] = value, value.copy()
            for item in value.values() if isinstance(value, dict) else value:
                self._save(item)

    def are_changed(self):
        return any(not _holds_the_same(value, copy) for value, copy in self.saved.values())

    def restore(self):
        for value, copy in self.saved.values():
            if _holds_the_same(value, copy):
                continue
            value.clear()
            value.extend(copy) if isinstance(value, list) else value.update(copy)


def _holds_the_same(a, b):
    def items(values):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return [(key, id(value)) for key, value in pairs]

    return items(a) == items(b)


def _is_known_function(target):
    home = getattr(target, "__module__", None) or type(target).__module__
    known = home.partition(".")[0] in ("torch", "_operator", "builtins", "math", "fastcls")
    return known or target in (getattr, math, operator)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))
_FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    functools.partial,
)
# Values that are what they are as long as the attribute is.
_NO_SETTINGS = (nn.Module, torch.Tensor, type, *_FUNCTIONS)
_CONSTANTS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@contextlib.contextmanager
def _recording_reads(owner, watch):
    """Names of the plain attributes of ``owner`` that are read, in ``watch.reads``."""

    def note(module, name, value):
        own = name in object.__getattribute__(module, "__dict__")
        if name in _MODULE_ATTRIBUTES or isinstance(value, _NO_SETTINGS):
            return
        if type(value) in _PROXIES or _is_computed(type(module), name, own):
            return
        if module is not owner:
            watch.unsure = f"forward reads {name} of another module"
        elif _is_constant(value):
            watch.reads.add(name)
        elif isinstance(value, list) and _is_constant(tuple(value)):
            watch.fixed = f"forward reads {name}, a list"
        else:
            watch.unsure = f"forward reads {name}, a {type(value).__name__}"

    watched, changed = {}, []
    try:
        for module in owner.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            cls = type(module)
            if cls not in watched:
                watched[cls] = _watched_class(cls, note)
            changed.append((module, cls))
            object.__setattr__(module, "__class__", watched[cls])
        yield
    finally:
        for module, cls in changed:
            object.__setattr__(module, "__class__", cls)


def _watched_class(cls, note):
    def __getattribute__(self, name):
        value = cls.__getattribute__(self, name)
        note(self, name, value)
        return value

    return type(cls.__name__, (cls,), {"__getattribute__": __getattribute__})


def _is_computed(cls, name, own):
    """Is it a property, say, which reads other attributes itself?"""
    return not own and hasattr(inspect.getattr_static(cls, name, None), "__get__")


def _is_constant(value):
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, (*_CONSTANTS, enum.Enum))


@contextlib.contextmanager
def _answering_for_proxies(say_tensor):
    """``isinstance`` and ``hasattr`` for proxies, which stand for whatever forward is given.

    PyTorch is told that they are tensors. The forward is told so, or that they are not; what else
    they might be it cannot find out.
    """
    real_isinstance, real_hasattr = builtins.isinstance, builtins.hasattr

    def isinstance_(obj, classes):
        if type(obj) not in _PROXIES or real_isinstance(obj, classes):
            return real_isinstance(obj, classes)
        asks = sys._getframe(1)
        if asks.f_code is torch.is_tensor.__code__:
            asks = asks.f_back
        if asks.f_globals.get("__name__", "").startswith(("torch.fx", "torch.nn.parameter")):
            return False
        if issubclass(torch.Tensor, classes):
            return say_tensor or not _is_users(asks)
        if not _is_users(asks):
            return False
        raise CannotTrace("forward asks for the type of its arguments")

    def hasattr_(obj, name):
        if type(obj) in _PROXIES and _is_users(sys._getframe(1)):
            raise CannotTrace("forward asks what its arguments have")
        return real_hasattr(obj, name)

    builtins.isinstance, builtins.hasattr = isinstance_, hasattr_
    try:
        yield
    finally:
        builtins.isinstance, builtins.hasattr = real_isinstance, real_hasattr


_NOT_USERS = {"torch", "fastcls"} | sys.stdlib_module_names


def _is_users(frame):
    return frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_USERS


@contextlib.contextmanager
def _noticing_types_asked_for(owner):
    """``type(x)`` cannot be answered for a proxy: code of the user's that has it is refused."""
    seen = {getattr(inspect.unwrap(type(owner).forward), "__code__", None)} - {None}

    def profile(frame, event, _):
        if event == "call" and _is_users(frame):
            seen.add(frame.f_code)

    profiled = sys.getprofile() is not None  # whose profiler could not be put back
    if not profiled:
        sys.setprofile(profile)
    try:
        yield
    finally:
        if not profiled:
            sys.setprofile(None)
    for function in seen:
        for step in dis.get_instructions(function):
            if step.opname == "LOAD_GLOBAL" and step.argval == "type":
                raise CannotTrace("forward asks for the type of something")


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
