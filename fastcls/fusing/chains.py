"""Finds chains of steps that one fused op can do, across the borders of modules.

A value is followed from the step that makes it to the one that uses it: within a graph, out of a
module whose result it is, into a module whose argument it is.
"""

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx, nn

from fastcls.fusing.steps import KEPT, STATE, Step, changed_call, input_of, read
from fastcls.fusing.tracing import Traced

HEADS = ("conv", "log_softmax", "cross_entropy")
LOSSES = ("log_softmax", "nll_loss", "cross_entropy")


class Link(NamedTuple):
    """A step at its place: the graph and the node."""

    traced: Traced
    node: fx.Node
    step: Step

    @property
    def path(self) -> str:
        """The module's name in the model; for a function, that of the module which calls it."""
        names = [self.traced.path, self.step.name if self.step.module is not None else ""]
        return ".".join(filter(None, names))

    @property
    def what(self) -> str:
        module = self.step.module
        return self.step.name if module is None else type(module).__name__


@dataclass(eq=False)
class Chain:
    """``head`` and the steps after it that could be done with it.

    ``ended`` says why a step that could have followed was left out, ``refusal`` why nothing is
    fused at all.
    """

    head: Link
    links: list[Link] = field(default_factory=list)
    ended: str = ""
    refusal: str | None = None

    @property
    def all_links(self) -> list[Link]:
        return [self.head, *self.links]

    def link(self, kind: str) -> Link | None:
        return next((link for link in self.links if link.step.kind == kind), None)

    def shorten(self, length: int, why: str) -> None:
        """Leave out the steps from number ``length`` on, and the chain if too little is left."""
        del self.links[length:]
        self.ended = why
        if self.head.step.kind == "cross_entropy":
            return
        if all(link.step.kind == "batch_norm" for link in self.links):
            self.refuse(why)

    def refuse(self, why: str) -> None:
        self.refusal = why
        self.links.clear()


def signature(link: Link):
    """Equal for two steps that do the same: modules by identity, functions by arguments."""
    step = link.step
    if step.module is not None:
        return step.kind, id(step.module)
    return step.kind, {k: v for k, v in step.arguments.items() if not isinstance(v, fx.Node)}


class View:
    """All graphs of a model in one mode, seen as one flow.

    ``opaque``: modules that may be called unseen, {id: why}.
    """

    def __init__(self, traced: list[Traced], root: nn.Module, opaque: dict[int, str]):
        self.traced = traced
        self.root = root
        self.opaque = opaque
        self.by_owner = {id(t.owner): t for t in traced}
        self.calls = defaultdict(list)  # id of a module → [(graph, node)]
        for t in traced:
            for node in t.graph.nodes:
                if node.op == "call_module":
                    self.calls[id(t.owner.get_submodule(node.target))].append((t, node))

    def chains(self) -> list[Chain]:
        """Every convolution, log-softmax and cross-entropy, with the steps that follow it."""
        return [
            self._chain(Link(t, node, step))
            for t in self.traced
            for node in t.graph.nodes
            if (step := self._step(t, node)) and step.kind in HEADS
        ]

    def _step(self, traced: Traced, node: fx.Node) -> Step | None:
        if node.op == "call_module" and self._inner(traced, node) is not None:
            return None  # looked into instead
        return read(node, traced.owner)

    def _inner(self, traced: Traced, call: fx.Node) -> Traced | None:
        return self.by_owner.get(id(traced.owner.get_submodule(call.target)))

    def _chain(self, head: Link) -> Chain:
        chain = Chain(head)
        calls = len(self.calls[id(head.step.module)])
        if head.step.refusal:
            chain.refuse(head.step.refusal)
        elif calls > 1 and head.step.kind == "conv":
            chain.refuse(f"{head.what} is called {calls} times")
        elif head.step.kind == "log_softmax" and _may_be_overwritten(
            head.traced, input_of(head.node)
        ):
            chain.refuse("the logits may be overwritten")
        at = head.traced, head.node
        while not chain.refusal and (expected := _expected(chain)):
            found = self._next(*at)
            if isinstance(found, str):
                if not _does_something(chain):
                    chain.refuse(found)
                break
            traced, node, value = found
            step = self._step(traced, node)
            if step is None or step.kind not in expected or input_of(node) is not value:
                if not _does_something(chain):
                    chain.refuse(f"no {_wanted(chain)} follows")
                break
            link = Link(traced, node, step)
            if refusal := step.refusal or self._unfit(head, link):
                chain.shorten(len(chain.links), refusal)
                break
            chain.links.append(link)
            at = traced, node
        return chain

    def _unfit(self, head: Link, link: Link) -> str | None:
        """Why this step, if it is a batch norm, cannot be folded into the convolution."""
        if link.step.kind != "batch_norm":
            return None
        if (link.step.module is None) != (head.step.module is None):
            return "of convolution and batch norm one is a module, one a function"
        if link.step.module is None:
            return _unfit_function(head, link)
        tensors = itertools.chain(link.step.module.parameters(), link.step.module.buffers())
        if self._tensors_read & {id(t) for t in tensors}:  # or written to, before the norm or after
            return "forward itself reads a tensor of the batch norm"
        return None

    @functools.cached_property
    def _tensors_read(self) -> set[int]:
        """Ids of the parameters and buffers that forwards read themselves."""
        return {
            id(_attribute(t.owner, node.target))
            for t in self.traced
            for node in t.graph.nodes
            if node.op == "get_attr"
        }

    def _next(self, traced: Traced, value: fx.Node) -> tuple[Traced, fx.Node, fx.Node] | str:
        """Graph and node of the only use of ``value``, and its name there; or why there is none."""
        while True:
            if len(value.users) != 1:
                return f"its result is used {len(value.users)} times"
            (user,) = value.users
            if value.meta.get(KEPT):
                return "its result is kept by forward"
            if user.meta.get(STATE) != value.meta.get(STATE):
                return "autocast or grad mode changes"
            if user.op == "output":
                where = self._caller(traced, user, value)
            elif user.op == "call_module":
                inner = self._inner(traced, user)
                if inner is None:
                    return traced, user, value
                where = self._inside(inner, user, value)
            else:
                return traced, user, value
            if isinstance(where, str):
                return where
            traced, value = where

    def _caller(self, traced: Traced, output: fx.Node, value: fx.Node):
        if traced.owner is self.root:
            return "its result leaves the model"
        if output.args[0] is not value:
            return f"its result leaves {traced.path} along with others"
        return self._crossing(traced) or self.calls[id(traced.owner)][0]

    def _inside(self, inner: Traced, call: fx.Node, value: fx.Node):
        if call.args != (value,) or call.kwargs:
            return f"{inner.path} has other arguments besides"
        arguments = (n for n in inner.graph.nodes if n.op == "placeholder")
        return self._crossing(inner) or (inner, next(arguments))

    def _crossing(self, traced: Traced) -> str | None:
        """Why no chain may cross the border of this module."""
        calls = len(self.calls[id(traced.owner)])
        if calls == 0:
            return f"{traced.path} is called by a forward that could not be traced"
        if calls > 1:
            return f"{traced.path} is called {calls} times"
        if id(traced.owner) in self.opaque:
            return self.opaque[id(traced.owner)]
        why = changed_call(traced.owner)
        return why and f"{traced.path}: {why}"


def _expected(chain):
    """Kinds that may come next; batch_norm only directly behind the convolution."""
    kinds = {link.step.kind for link in chain.links}
    if chain.head.step.kind == "log_softmax":
        return {"nll_loss"} - kinds
    if chain.head.step.kind == "cross_entropy":
        return set()
    if not kinds:
        return {"batch_norm", "relu", "max_pool"}
    return {"relu", "max_pool"} - kinds


def _unfit_function(head, link):
    """Why a batch norm that is a function cannot be folded into this convolution."""
    if link.traced is not head.traced:
        return "convolution and batch norm are functions in two forwards"
    nodes = list(head.traced.graph.nodes)
    conv, norm = nodes.index(head.node), nodes.index(link.node)
    for value in link.step.arguments.values():
        if isinstance(value, fx.Node) and value.op != "get_attr" and value not in nodes[:conv]:
            return "what batch norm multiplies by is computed after the convolution"
    if any(_may_write(node, head.traced.owner) for node in nodes[conv + 1 : norm]):
        return "a tensor may be overwritten between convolution and batch norm"
    return None


def _attribute(owner, target):
    path, _, name = target.rpartition(".")
    module = owner.get_submodule(path)
    tensors = (module._parameters, module._buffers, vars(module))  # no property is computed
    return next((held[name] for held in tensors if name in held), None)


def _does_something(chain):
    return any(link.step.kind != "batch_norm" for link in chain.links)


def _wanted(chain):
    return (
        "negative log-likelihood" if chain.head.step.kind == "log_softmax" else "ReLU or max-pool"
    )


# Uses of a tensor that leave it as it is, and those whose results share its memory.
_READS = {"argmax", "argmin", "max", "mean", "size", "softmax", "sum", "topk"}
_VIEWS = {"detach", "flatten", "getitem", "reshape", "squeeze", "transpose", "unsqueeze", "view"}


def _name(node):
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _may_write(node, owner):
    """Might this step change a tensor in place, its input or any other?"""
    if node.op not in ("call_function", "call_method"):
        return node.op == "call_module"
    step = read(node, owner)
    if step is not None and step.kind == "batch_norm":
        return step.arguments["training"] is not False  # which moves the statistics
    name = _name(node)
    if name.endswith("_") or name in ("setitem", "instance_norm"):
        return True
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    if any(value is True for value in node.args):  # that may be inplace
        return True
    return node.op == "call_function" and not _is_of_torch(node.target)


def _is_of_torch(function):
    """Is it one of those whose names tell whether they work in place?"""
    if isinstance(function, (torch._ops.OperatorBase, torch._ops.OpOverloadPacket)):
        return False
    home = getattr(function, "__module__", None) or "torch"  # of many in C there is none
    if home == "_operator":
        return not function.__name__.startswith("i")  # iadd, imul
    return home.partition(".")[0] in ("torch", "builtins", "math")


def _may_be_overwritten(traced, value):
    """Might another use of the logits, or of what they are a view of, write over them?"""
    while isinstance(value, fx.Node):
        if not _is_only_read(traced, value):
            return True
        value = input_of(value) if _name(value) in _VIEWS else None
    return False


def _is_only_read(traced, value):
    for user in value.users:
        step = read(user, traced.owner)
        reads = user.op == "output" or _name(user) in _READS or (step and step.kind in LOSSES)
        if not reads and not (_name(user) in _VIEWS and _is_only_read(traced, user)):
            return False
    return True
