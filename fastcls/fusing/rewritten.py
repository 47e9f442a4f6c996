"""New forwards for modules whose own one calls functions that a fused op does already.

The module keeps its class's name, methods and place in the hierarchy: it becomes an instance of a
subclass that has another ``forward``, kept as source text so that it can be copied and pickled.
"""

import functools
import linecache
from typing import NamedTuple

from torch import fx


class Forward(NamedTuple):
    """Source text of ``def forward(self, ...)`` and of the imports before it."""

    imports: str
    source: str

    @classmethod
    def of(cls, graph: fx.Graph) -> "Forward":
        written = graph.python_code("self")
        imports = "\n".join(_import(name, value) for name, value in written.globals.items())
        return cls(imports, written.src.strip())


def _import(name, value):
    """The statement that makes ``name`` stand for ``value``: a module, or something in one."""
    if isinstance(value, float):  # inf and nan
        return f'{name} = float("{value}")'
    if hasattr(value, "__spec__"):
        return f"import {value.__name__} as {name}" if name != value.__name__ else f"import {name}"
    home = "types" if value is type(None) else value.__module__
    return f"from {home} import {value.__qualname__} as {name}"


@functools.cache
def rewritten_class(
    base: type, train: Forward | None, evaluation: Forward | None, reads: frozenset
) -> type:
    """A subclass of ``base`` with these forwards, or its own. The same arguments give one class.

    ``reads``: attributes by whose values the chains were found; setting them is an error.
    """

    def __setattr__(self, name, value):
        if name in reads and not _is_equal(value, getattr(self, name, None)):
            raise AttributeError(
                f"{base.__name__}.{name}: fuse went by its value in forward; "
                "unfuse the model, set it, and fuse again"
            )
        base.__setattr__(self, name, value)

    def __reduce_ex__(self, protocol):
        _, _, *state = base.__reduce_ex__(self, max(protocol, 2))
        return _new, (base, train, evaluation, reads), *state

    members = {
        "__setattr__": __setattr__,
        "__reduce_ex__": __reduce_ex__,
        "__doc__": base.__doc__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    if train is not None:
        members["forward"] = _forward(base, train, evaluation)
    return type(base.__name__, (base,), members)


def _is_equal(a, b):
    return a is b or (type(a) is type(b) and a == b)


def _forward(base, train, evaluation):
    in_training, in_evaluation = (_compiled(base, forward) for forward in (train, evaluation))
    if train == evaluation:
        return in_training

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        if self.training:
            return in_training(self, *args, **kwargs)
        return in_evaluation(self, *args, **kwargs)

    return forward


def _new(base, train, evaluation, reads):
    cls = rewritten_class(base, train, evaluation, reads)
    return cls.__new__(cls)


def _compiled(base, forward):
    text = f"{forward.imports}\n{forward.source}\n"
    name = f"<fused forward of {base.__qualname__} {hash(forward):x}>"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name  # tracebacks
    namespace = {}
    exec(compile(text, name, "exec"), namespace)
    return functools.wraps(base.forward)(namespace["forward"])
