"""The user's Python code that a trace ran, read for questions that no proxy can answer.

What a proxy cannot intercept, ``x is None`` say, it answers as if it were a value of its own.
"""

import ast
import contextlib
import dis
import functools
import inspect
import sys
import textwrap
from dataclasses import dataclass, field

_NOT_USERS = {"torch", "fastcls"} | sys.stdlib_module_names


def is_users(frame):
    return frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_USERS


@dataclass
class Ran:
    """A function that ran: names of its variables that were seen, those that held proxies."""

    seen: set[str] = field(default_factory=set)
    proxies: set[str] = field(default_factory=set)


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
        it = ran.setdefault(frame.f_code, Ran())
        variables = frame.f_locals
        it.seen.update(variables)
        it.proxies.update(name for name, value in variables.items() if holds_proxies(value))

    code = getattr(inspect.unwrap(type(owner).forward), "__code__", None)
    if code is not None:
        ran[code] = Ran(seen=set(code.co_varnames[:1]))
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
