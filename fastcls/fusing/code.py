"""The user's Python code that a trace ran, read for what the trace did not show.

Questions that a proxy cannot intercept, ``x is None`` say, it answers as if it were a value of its
own. Settings outside the module are read unseen, and what is printed is in no graph.
"""

import ast
import builtins
import contextlib
import dis
import enum
import functools
import inspect
import logging
import os
import sys
import textwrap
import types
import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

_NOT_USERS = {"torch", "fastcls"} | sys.stdlib_module_names


def is_users(frame):
    return _is_users_module(frame.f_globals.get("__name__", ""))


def _is_users_module(name):
    return name.partition(".")[0] not in _NOT_USERS


@dataclass
class Ran:
    """A function that ran: names of its variables that were seen, those that held proxies.

    ``closed``: those from functions around it whose values may change inside.
    """

    globals: dict
    seen: set[str] = field(default_factory=set)
    proxies: set[str] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)


@contextlib.contextmanager
def recording_code(owner, proxies):
    """The user's code that runs, as {code: Ran}; of a profiled program the forward's alone.

    Args:
        proxies: their types.
    """
    ran = {}

    def holds_proxies(value):
        if isinstance(value, (list, tuple, dict)):
            items = value.values() if isinstance(value, dict) else value
            return any(type(item) in proxies for item in items)
        return type(value) in proxies

    def profile(frame, event, _):
        if event not in ("call", "return") or not is_users(frame):
            return
        it = ran.setdefault(frame.f_code, Ran(frame.f_globals))
        variables = frame.f_locals
        free = {name: variables.get(name) for name in frame.f_code.co_freevars}
        it.closed.update(n for n, v in free.items() if _is_setting(v) and not is_constant(v))
        it.seen.update(variables)
        it.proxies.update(name for name, value in variables.items() if holds_proxies(value))

    forward = inspect.unwrap(type(owner).forward)
    if isinstance(forward, types.FunctionType):
        code = forward.__code__
        ran[code] = Ran(forward.__globals__, seen=set(code.co_varnames[:1]))
    profiled = sys.getprofile() is not None  # whose profiler could not be put back
    if not profiled:
        sys.setprofile(profile)
    try:
        yield ran
    finally:
        if not profiled:
            sys.setprofile(None)


def unanswered(ran) -> str | None:
    """A question in the code that was answered for the proxy, not for what it stands for."""
    for code, it in ran.items():
        if any(
            i.opname == "LOAD_GLOBAL" and i.argval == "type" for i in dis.get_instructions(code)
        ):
            return "forward asks for the type of something"
        questions = _questions(code)
        if questions is None:
            return "forward asks whether something is None, and its source is not at hand"
        unseen = {*code.co_varnames, *code.co_cellvars} - it.seen
        for question, names in questions:
            if names & (it.proxies | unseen):
                return f"forward asks `{question}`"
    return None


@functools.cache
def _questions(code) -> list[tuple[str, set[str]]] | None:
    """Uses of ``is`` and of ``match`` and the names in them; None if it cannot be told."""
    steps = {i.opname for i in dis.get_instructions(code)}
    if not any(s == "IS_OP" or s.endswith("_NONE") or s.startswith("MATCH_") for s in steps):
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    return [
        (text, {n.id for n in ast.walk(asked) if isinstance(n, ast.Name)})
        for node in ast.walk(tree)
        for text, asked in _asked_by(node)
    ]


def _asked_by(node):
    if isinstance(node, ast.Match):
        yield f"match {ast.unparse(node.subject)}", node.subject
    if isinstance(node, ast.Compare) and any(isinstance(o, (ast.Is, ast.IsNot)) for o in node.ops):
        yield ast.unparse(node), node


# ---- settings and effects

# What a trace need not watch: it is in the graph, or is called.
FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    functools.partial,
)
NO_SETTINGS = (nn.Module, torch.Tensor, type, *FUNCTIONS)
# Values that are what they are as long as the variable is.
_CONSTANTS = (int, float, complex, str, bytes, type(None), torch.Size)
_CONSTANTS += (torch.dtype, torch.device, torch.layout, torch.memory_format)


def is_constant(value):
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    return isinstance(value, (*_CONSTANTS, enum.Enum))


def _is_setting(value):
    if isinstance(value, (*NO_SETTINGS, enum.Enum)) or callable(value):
        return False
    return type(value).__module__ not in ("typing", "torch.fx.proxy", "fastcls.fusing.noticing")


def setting(ran) -> str | None:
    """A global of the user's that the code read, or what else may change unseen."""
    local = {name for code in ran for name in code.co_cellvars}
    for code, it in ran.items():
        for text, home, value in _loaded(code, it.globals):
            if _may_change(home, value):
                return f"forward reads {text}"
        if closed := sorted(it.closed - local):
            return f"forward reads {closed[0]}"
    return None


def _may_change(home, value):
    if value is os.getenv:
        return True
    if not _is_setting(value) or isinstance(value, logging.Logger) or _is_number(value):
        return False
    return _is_users_module(home) or not is_constant(value)


def _is_number(value):
    """A size or factor, ``x.view(-1, SIZE)``; what is switched is a flag or a name."""
    if isinstance(value, tuple):
        return all(map(_is_number, value))
    return isinstance(value, (int, float, complex)) and not isinstance(value, bool)


_EFFECTS = (print, open, warnings.warn)


def effect(ran) -> str | None:
    """What the code does that a new forward would not."""
    for code, it in ran.items():
        if any(i.opname == "STORE_GLOBAL" for i in dis.get_instructions(code)):
            return "forward sets a global"
        for text, home, value in _loaded(code, it.globals):
            logs = home == "logging" or isinstance(value, logging.Logger)
            if logs or any(value is e for e in _EFFECTS):
                return f"forward uses {text}"
    return None


def _loaded(code, variables):
    """Globals of the code, down the attributes of modules and classes: name, its home, value."""
    steps = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    for number, step in enumerate(steps):
        if step.opname != "LOAD_GLOBAL":
            continue
        text = step.argval
        home = variables if text in variables else vars(builtins)
        home, value = home.get("__name__", ""), home.get(text)
        for after in steps[number + 1 :]:
            if after.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            if not isinstance(value, (types.ModuleType, type)):
                break
            text = f"{text}.{after.argval}"
            home = getattr(value, "__module__" if isinstance(value, type) else "__name__", "")
            value = getattr(value, after.argval, None)
        yield text, home, value
