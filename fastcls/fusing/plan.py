"""What can be fused in a model, and why the rest cannot: nothing is changed here."""

import ast
import functools
import inspect
import itertools
import textwrap
import threading
import types
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from fastcls.fusing.chains import Chain, Link, View, signature
from fastcls.fusing.noticing import CannotTrace
from fastcls.fusing.report import FusionReport, Row
from fastcls.fusing.steps import ALREADY, read_module
from fastcls.fusing.tracing import has_forward, is_leaf, trace_both_modes


class Untraced(NamedTuple):
    module: nn.Module
    path: str
    why: str


@dataclass
class Plan:
    """``groups``: the chains of one head in both modes, one chain where the modes are the same."""

    groups: list[list[Chain]]
    untraced: list[Untraced]
    views: list[View]
    losses: list[tuple[str, nn.Module]]  # cross-entropy modules
    by_class: set[int] = field(default_factory=set)  # ids of the modules whose class changes

    def accepted(self) -> list[Chain]:
        return [chain for group in self.groups for chain in group if not chain.refusal]

    def loss_rows(self) -> list[Row]:
        return [_loss_row(path, module) for path, module in self.losses]

    def report(self) -> FusionReport:
        rows = [_row(group) for group in self.groups if _is_in(group, self.views[0])]
        evaluation = [_row(group) for group in self.groups if not _is_in(group, self.views[0])]
        rows += [row for row in evaluation if row not in rows]
        rows += self.loss_rows()
        called = {id(t.owner) for view in self.views for t in view.traced}
        for path, why, name in _never_called(self, called):
            rows.append(Row(path, name, False, why))
        notes = [f"{u.path or 'the model'} was not traced: {u.why}" for u in self.untraced]
        return FusionReport(rows, notes)


# A trace sets builtins and classes aside for the whole process: of two at once, the first to end
# would put its own in the second's place, for good.
_ONE_AT_A_TIME = threading.RLock()


def make_plan(model: nn.Module) -> Plan:
    with _ONE_AT_A_TIME:
        traced, untraced = _trace_all(model)
    opaque = _opaque(untraced)
    views = [View([t[0] for t in traced], model, opaque)]
    if any(train is not evaluation for train, evaluation in traced):
        views.append(View([t[1] for t in traced], model, opaque))
    names = {id(m): name for name, m in reversed(list(model.named_modules()))}
    losses = [(names[id(m)], m) for m in model.modules() if isinstance(m, nn.CrossEntropyLoss)]
    plan = Plan(_groups(views), untraced, views, losses)
    _drop_what_cannot_be(plan)
    return plan


def _trace_all(model):
    traced, untraced = [], []
    for path, module in model.named_modules():
        if is_leaf(module) or not has_forward(module):
            continue
        try:
            traced.append(trace_both_modes(module, path))
        except CannotTrace as why:
            untraced.append(Untraced(module, path, str(why)))
    return traced, untraced


def _groups(views):
    """Chains of one head together, cut to the steps that they share in both modes."""
    groups: dict[object, list[Chain]] = {}
    for view in views:
        for chain in view.chains():
            head = chain.head
            if head.step.kind == "cross_entropy" and head.step.module is not None:
                continue  # a module of its own: swapped whoever calls it
            key = head.node if head.step.module is None else id(head.step.module)
            groups.setdefault(key, []).append(chain)
    for group in groups.values():
        _agree(group, len(views))
    return list(groups.values())


_DIFFER = "training and evaluation differ in what follows"


def _agree(group, modes):
    refusals = {chain.refusal for chain in group}
    why = group[0].refusal if len(refusals) == 1 else _DIFFER
    if len(group) < modes and group[0].head.step.module is not None:
        why = "it is called in one of training and evaluation only"
    if why:
        for chain in group:
            chain.refuse(why)
        return
    steps = zip(*([signature(link) for link in chain.links] for chain in group), strict=False)
    shared = len(list(itertools.takewhile(lambda step: all(s == step[0] for s in step), steps)))
    if any(len(chain.links) > shared for chain in group):
        for chain in group:
            chain.shorten(shared, _DIFFER)


# ----------------------------------------------------------------------------------- acceptance


def _drop_what_cannot_be(plan):
    """Shorten and refuse chains until every step left can be taken out of its forward."""
    opaque = plan.views[0].opaque
    changed = True
    while changed:
        changed = False
        taken = {(id(link.traced), link.node) for c in plan.accepted() for link in c.all_links}
        plan.by_class = set()
        for group in plan.groups:
            for chain in group:
                if chain.refusal:
                    continue
                changed |= _drop_from(plan, group, chain, taken, opaque)


def _drop_from(plan, group, chain, taken, opaque):
    if why := next((link.traced.unsure for link in chain.all_links if link.traced.unsure), None):
        for c in group:
            c.refuse(f"{why}, which may change")
        return True
    if why := _head_stays(chain.head, opaque):
        for c in group:
            c.refuse(why)
        return True
    for number, link in enumerate(chain.links):
        why = _stays(plan, link, taken, opaque)
        if why is None:
            continue
        if link.step.kind in ("batch_norm", "nll_loss"):
            number = 0
        for c in group:
            c.shorten(number, why)
        return True
    if chain.head.step.kind == "conv":
        return False
    # What dtype a log-softmax has depends on the autocast region that it stands in.
    unsure = next((link.traced.fixed for link in chain.all_links if link.traced.fixed), None)
    if why := unsure or _stays(plan, chain.head, taken, opaque):
        for c in group:
            c.refuse(why)
        return True
    return False


def _head_stays(head, opaque):
    module = head.step.module
    if module is None:
        return head.traced.fixed and f"{head.traced.path or 'forward'}: {head.traced.fixed}"
    if head.step.kind == "conv" and id(module) in opaque:
        return opaque[id(module)]
    return None


def _stays(plan, link, taken, opaque):
    """Why the work of this step cannot be taken out of the forward that does it; None if it can.

    A module whose every call is part of a chain changes its class; for any other step a new
    forward is written for the module that calls it.
    """
    step, traced = link.step, link.traced
    if step.module is not None:
        stateful = step.kind in ("batch_norm", "nll_loss")
        calls = [view.calls[id(step.module)] for view in plan.views]
        absorbed = all((id(t), node) in taken for view in calls for t, node in view)
        if stateful and any(len(view) > 1 for view in calls):
            absorbed = False
        if absorbed and id(step.module) not in opaque:
            plan.by_class.add(id(step.module))
            return None
        if stateful or type(traced.owner).forward is nn.Sequential.forward:
            return opaque.get(id(step.module), f"{link.what} {link.path} is called elsewhere too")
    if traced.fixed:
        return f"{traced.path or 'the model'}: {traced.fixed}"
    return None


def _opaque(untraced):
    """Modules that a forward nobody could trace may call at any time: {id: why}."""
    found = {}
    for module, path, _ in untraced:
        why = f"{path or 'the model'} could not be traced and may call it at any time"
        into = _reached_into(module)
        for name, child in module.named_children():
            within = child.modules() if into is None or name in into else [child]
            found |= {id(m): why for m in within}
        held = [value for name, value in vars(module).items() if name != "_modules"]
        found |= {id(m): why for top in _modules_in(held) for m in top.modules()}
    return found


def _modules_in(value):
    """Modules in lists, tuples and dicts of any depth."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item)


def _reached_into(module):
    """Names of the children of which a method does more than call ``self.child(...)``.

    None if it cannot be told: the source is not at hand, ``self`` itself is handed on, or a method
    of ``nn.Module`` is used that gives modules.
    """
    reached = set()
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return reached
        names = _reached_by(cls)
        if names is None:
            return None
        reached |= names
    return None


@functools.cache
def _reached_by(cls):
    try:
        lines, first = inspect.getsourcelines(cls)
        (definition,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (OSError, TypeError, SyntaxError):
        return None
    written = range(first, first + len(lines))
    functions = (f.__code__ for f in vars(cls).values() if isinstance(f, types.FunctionType))
    if any(code.co_firstlineno not in written for code in functions):
        return None  # a method from elsewhere
    reached = set()
    for statement in definition.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if statement.name == "__init__" or not statement.args.args:
                continue
            names = _reached_in(statement, statement.args.args[0].arg)
            if names is None:
                return None
            reached |= names
        elif not _is_plain(statement):
            return None
    return reached


def _is_plain(statement):
    """A docstring, a declaration or a constant."""
    if isinstance(statement, ast.Pass):
        return True
    if not isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign)):
        return False
    try:
        ast.literal_eval(statement.value or ast.Constant(None))
    except ValueError:
        return False
    return True


# What forward may use of nn.Module without getting at other modules.
_HARMLESS = {"forward", "register_buffer", "training", "__class__", "_get_name"}


def _reached_in(method, itself):
    nodes = list(ast.walk(method))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    uses = [n for n in nodes if isinstance(n, ast.Attribute) and _is_name(n.value, itself)]
    owned = {id(use.value) for use in uses}
    if any(_is_name(node, itself) and id(node) not in owned for node in nodes):
        return None
    if any(hasattr(nn.Module, use.attr) and use.attr not in _HARMLESS for use in uses):
        return None
    return {use.attr for use in uses if id(use) not in called}


def _is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name


# --------------------------------------------------------------------------------------- report


def _is_in(group, view):
    return group[0].head.traced in view.traced


def _row(group):
    chain = group[0]
    links: list[Link] = chain.all_links
    names = " → ".join(link.what for link in links)
    if chain.refusal:
        return Row(links[0].path, names, chain.refusal == ALREADY, chain.refusal)
    folded = "in evaluation alone: training a batch norm takes PyTorch's kernels"
    told = chain.ended or (folded if chain.link("batch_norm") else "")
    return Row(links[0].path, names, True, told)


def _loss_row(path, module):
    step = read_module(module, path)
    fused = step.refusal in (None, ALREADY)
    return Row(path, type(module).__name__, fused, step.refusal or "")


def _never_called(plan, owners):
    """Convolutions that no traced forward calls."""
    seen = {id(c.head.step.module) for group in plan.groups for c in group}
    for path, module in plan.views[0].root.named_modules():
        if isinstance(module, nn.Conv2d) and id(module) not in seen | owners:
            why = "no forward that was traced calls it"
            yield path, read_module(module, path).refusal or why, type(module).__name__
