"""The forward of one module as torch.fx graphs, children uncalled; or why there are none.

A trace sees one way through the Python code. It is taken for the whole only where nothing hides
another: it is repeated with tensors that say they are tensors and with ones that do not, with
optional arguments given and left at their defaults, in training mode and in evaluation mode, with
the children in the other mode, gradients off and autocast on.
"""

import contextlib
import gc
import inspect
import itertools
import math
import operator
import weakref
from dataclasses import dataclass

import torch
from torch import fx, nn

from fastcls.fusing.code import effect, recording_code, setting, unanswered
from fastcls.fusing.noticing import (
    PROXIES,
    CannotTrace,
    Contents,
    Generators,
    Proxy,
    RefusingWrites,
    Watch,
    answering_for_proxies,
    global_modes,
    global_state,
    noticing_saved_tensor_hooks,
    recording_reads,
)
from fastcls.fusing.steps import KEPT, STATE, calls_itself, changed_call


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
            with torch.inference_mode(False), global_modes(grad=True, autocast=False):
                modes.append(_trace_certainly(owner, path))
            with _below_in_the_other_mode(owner), global_modes(grad=False, autocast=True):
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
    watch = Watch()
    tracer = _Tracer(watch)
    attributes, generators = Contents(owner), Generators()
    data = [(t, t.data) for t in itertools.chain(owner.parameters(), owner.buffers())]
    collects = gc.isenabled()
    gc.disable()
    try:
        with (
            recording_reads(owner, watch),
            noticing_saved_tensor_hooks(watch),
            answering_for_proxies(watch, say_tensor),
            recording_code(owner, PROXIES) as ran,
            RefusingWrites(watch),
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
        tracer.root = None  # which would live until Python collects cycles
        attributes.restore()
        if collects:
            gc.enable()
        exchanged = [(t, old) for t, old in data if not torch._C._is_alias_of(t, old)]
        for tensor, old in exchanged:
            tensor.data = old
    if why := watch.refused or unanswered(ran):
        raise CannotTrace(why)
    if exchanged:
        raise CannotTrace("forward gives a parameter or buffer other data")
    if drew:
        raise CannotTrace("forward draws random numbers")
    for node in kept:
        node.meta[KEPT] = True
        watch.fixed = "forward keeps tensors"
    if hasattr(type(owner).forward, "__wrapped__"):
        watch.fixed = "forward is decorated"
    watch.fixed, watch.unsure = watch.fixed or effect(ran), watch.unsure or setting(ran)
    if isinstance(owner, fx.GraphModule):
        watch.fixed = "it is a torch.fx.GraphModule"
    for node in graph.nodes:
        if node.op == "call_module" and calls_itself(owner.get_submodule(node.target)):
            raise CannotTrace(f"forward calls {node.target}, which has a __call__ of its own")
        node.type = None  # annotations may be of any kind; a new forward keeps the old one's
        if node.op == "call_function" and not _is_known_function(node.target):
            watch.fixed = f"forward calls {node.target.__name__}, which is wrapped for torch.fx"
    return Traced(owner, path, graph, frozenset(watch.reads), watch.fixed, watch.unsure)


class _Tracer(fx.Tracer):
    """Calls of children stay calls; what changes the meaning of later operations is noticed."""

    proxy_buffer_attributes = True

    def __init__(self, watch):
        super().__init__(autowrap_modules=())
        self.watch = watch
        self.state = global_state()
        self.proxies = []

    def to_bool(self, obj):
        try:
            return super().to_bool(obj)
        except fx.proxy.TraceError as error:
            self.watch.refuse(str(error))

    def iter(self, obj):
        try:
            return super().iter(obj)
        except fx.proxy.TraceError as error:
            self.watch.refuse(str(error))

    def is_leaf_module(self, m, module_qualified_name):
        return True

    def proxy(self, node):
        proxy = Proxy(node, self)
        self.proxies.append((weakref.ref(proxy), node))
        return proxy

    def kept(self):
        """Nodes of which somebody still has the proxy, now that ``forward`` has returned."""
        if any(proxy() is not None for proxy, _ in self.proxies):
            gc.collect(0)  # they are young: nothing was collected while the forward was traced
        return [node for proxy, node in self.proxies if proxy() is not None]

    def create_proxy(self, *args, **kwargs):
        proxy = super().create_proxy(*args, **kwargs)
        if (state := global_state()) != self.state:
            self.watch.fixed = "forward changes autocast or grad mode"
            proxy.node.meta[STATE] = state
        return proxy

    def create_arg(self, a):
        if type(a) in PROXIES:
            return a.node
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            self.watch.refuse("forward makes a tensor of its own")
        if isinstance(a, dict) and type(a) is not dict:
            self.watch.fixed = f"forward makes a {type(a).__name__}"
        if isinstance(a, float):  # NumPy's say what they are in a way that is no Python
            a = float(a)
        return super().create_arg(a)


def _is_known_function(target):
    home = getattr(target, "__module__", None) or type(target).__module__
    known = home.partition(".")[0] in ("torch", "_operator", "builtins", "math", "fastcls")
    return known or target in (getattr, math, operator)
