"""What a traced forward does that its graph does not show: noticed, refused or undone."""

import builtins
import contextlib
import inspect
import operator
import pickle
import random
import sys
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastcls.fusing.code import FUNCTIONS, NO_SETTINGS, is_constant, is_users


class CannotTrace(Exception):
    """The forward cannot be traced, or not with certainty; the message says why."""


@dataclass
class Watch:
    """What happened while a forward was traced that its graph does not show."""

    reads: set[str] = field(default_factory=set)
    fixed: str | None = None
    unsure: str | None = None
    refused: str | None = None

    def refuse(self, why: str):
        """Remembered, since the forward may catch the exception and go another way."""
        self.refused = why
        raise CannotTrace(why)


# ---- tensors and what stands for them


class _StandIn:
    """``x += 1`` is a call, since fx knows ``x = x + 1`` only, which leaves aliases of x alone."""

    def __len__(self):
        self.tracer.watch.refuse("forward asks how long something is that it is given")


def _add_in_place(name):
    operation = getattr(operator, name)

    def function(value, other):  # not operator's, which fx writes as a statement that rebinds x
        return operation(value, other)

    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    function.__name__ = function.__qualname__ = name
    globals()[name] = function  # where a new forward imports it from
    setattr(_StandIn, f"__{name}__", method)


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
    _add_in_place(f"i{_name}")
for _name in ("and", "or", "xor", "lshift", "rshift"):
    _add_in_place(f"i{_name}")


class Attribute(_StandIn, fx.proxy.Attribute):
    pass


class Proxy(_StandIn, fx.Proxy):
    """One whose attributes cannot be set: they would be lost."""

    def __getattr__(self, name):
        return Attribute(self, name)

    def __setattr__(self, name, value):
        if name not in ("node", "tracer"):
            self.tracer.watch.refuse(f"forward sets {name} of a tensor")
        super().__setattr__(name, value)


PROXIES = (fx.Proxy, Proxy, fx.proxy.Attribute, Attribute)


class RefusingWrites(TorchDispatchMode):
    """Of proxies it sees nothing; what is written to is a tensor of the user's."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.watch.refuse(f"forward writes to tensors ({func})")
        return func(*args, **(kwargs or {}))


# ---- global state


_AUTOCAST_DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def global_modes(grad, autocast):
    before = [torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES]
    for device in _AUTOCAST_DEVICES:
        torch.set_autocast_enabled(device, autocast)
    try:
        with torch.set_grad_enabled(grad):
            yield
    finally:
        for device, enabled in zip(_AUTOCAST_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


def global_state():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(d) for d in _AUTOCAST_DEVICES),
        *(torch.get_autocast_dtype(d) for d in _AUTOCAST_DEVICES),
    )


class Generators:
    """States of the generators of random numbers: Python's, PyTorch's, NumPy's if it is used."""

    def __init__(self):
        self.numpy = getattr(sys.modules.get("numpy"), "random", None)
        self.before = self._states()

    def _states(self):
        numpy = self.numpy and self.numpy.get_state(legacy=False)
        return pickle.dumps((random.getstate(), bytes(torch.get_rng_state().tolist()), numpy))

    def have_moved(self):
        return self._states() != self.before

    def restore(self):
        python, pytorch, numpy = pickle.loads(self.before)
        random.setstate(python)
        torch.set_rng_state(torch.tensor(list(pytorch), dtype=torch.uint8))
        if numpy is not None:
            self.numpy.set_state(numpy)


# ---- attributes


class Contents:
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


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) | frozenset(dir(nn.Module))


@contextlib.contextmanager
def recording_reads(owner, watch):
    """Names of the plain attributes of ``owner`` that are read, in ``watch.reads``."""
    itself = id(owner)  # the classes made here outlive the trace until Python collects cycles

    def note(module, name, value):
        own = name in object.__getattribute__(module, "__dict__")
        is_choice = own and isinstance(value, FUNCTIONS)  # self.act = F.relu
        if name in _MODULE_ATTRIBUTES or (isinstance(value, NO_SETTINGS) and not is_choice):
            return
        if type(value) in PROXIES or _is_computed(type(module), name, own):
            return
        if id(module) != itself:
            watch.unsure = f"forward reads {name} of another module"
        elif is_choice or is_constant(value):
            watch.reads.add(name)
        elif isinstance(value, list) and is_constant(tuple(value)):
            watch.fixed = f"forward reads {name}, a list"
        else:
            watch.unsure = f"forward reads {name}, a {type(value).__name__}"

    def note_setting(module, name):
        if id(module) != itself:  # its own are put back, and a new forward is not written
            watch.refuse(f"forward sets {name} of another module")

    watched, changed = {}, []
    try:
        for module in owner.modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            cls = type(module)
            if cls not in watched:
                watched[cls] = _watched_class(cls, note, note_setting)
            changed.append((module, cls))
            object.__setattr__(module, "__class__", watched[cls])
        yield
    finally:
        for module, cls in changed:
            object.__setattr__(module, "__class__", cls)


def _watched_class(cls, note, note_setting):
    def __getattribute__(self, name):
        value = cls.__getattribute__(self, name)
        note(self, name, value)
        return value

    def __setattr__(self, name, value):
        note_setting(self, name)
        cls.__setattr__(self, name, value)

    members = {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
    return type(cls.__name__, (cls,), members)


def _is_computed(cls, name, own):
    """Is it a property, say, which reads other attributes itself?"""
    return not own and hasattr(inspect.getattr_static(cls, name, None), "__get__")


@contextlib.contextmanager
def answering_for_proxies(watch, say_tensor):
    """``isinstance`` and ``hasattr`` for proxies, which stand for whatever forward is given.

    PyTorch is told that they are tensors. The forward is told so, or that they are not; what else
    they might be it cannot find out.
    """
    real_isinstance, real_hasattr = builtins.isinstance, builtins.hasattr

    def isinstance_(obj, classes):
        if type(obj) not in PROXIES or real_isinstance(obj, classes):
            return real_isinstance(obj, classes)
        asks = sys._getframe(1)
        if asks.f_code is torch.is_tensor.__code__:
            asks = asks.f_back
        if asks.f_globals.get("__name__", "").startswith(("torch.fx", "torch.nn.parameter")):
            return False
        if issubclass(torch.Tensor, classes):
            return say_tensor or not is_users(asks)
        if not is_users(asks):
            return False
        watch.refuse("forward asks for the type of its arguments")

    def hasattr_(obj, name):
        if type(obj) in PROXIES and is_users(sys._getframe(1)):
            watch.refuse("forward asks what its arguments have")
        return real_hasattr(obj, name)

    builtins.isinstance, builtins.hasattr = isinstance_, hasattr_
    try:
        yield
    finally:
        builtins.isinstance, builtins.hasattr = real_isinstance, real_hasattr


@contextlib.contextmanager
def noticing_saved_tensor_hooks(watch):
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
