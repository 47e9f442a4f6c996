"""fuse and forwards that hide something from a trace: the same numbers, fused or left alone."""

import builtins
import cProfile
import enum
import functools
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from nets import Net, conv, layers
from torch import nn

from fastcls import fuse, fusion_report, unfuse
from fastcls.fusing.dynamo import fastcls as in_graphs
from fastcls.fusing.dynamo import swap_chains


def results(model, x, *more):
    """Output, whether it has a graph, and the gradients of input and parameters."""
    torch.manual_seed(0)  # of the dropouts
    x = x.clone().requires_grad_()
    out = model(x, *more)
    wanted = [x, *model.parameters()]
    graph = out.requires_grad
    grads = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True) if graph else []
    return [out.detach(), *grads]


def assert_same_numbers(fused, native, *more, shape=(2, 3, 12, 12)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for mode in (True, False):
        ours, expected = (results(m.train(mode), x, *more) for m in (fused, native))
        assert len(ours) == len(expected)
        for got, want in zip(ours, expected, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def in_graphs_alone(gm, example_inputs):
    """The backend without Inductor."""
    swap_chains(gm)
    return gm.forward


def made(cls, **modules):
    torch.manual_seed(0)
    return cls(**modules)


# ------------------------------------------------------- what a trace gives to PyTorch as a number


NUMBERS = {
    "arange": lambda x: torch.arange(x.shape[1]),
    "zeros": lambda x: torch.zeros(x.size(0), 1, 1, 1),
    "tensor": lambda x: torch.tensor(x.shape[0]),
    "Tensor": lambda x: torch.Tensor(x.shape[0]).zero_(),
    "as_tensor": lambda x: torch.as_tensor(x).mean(),
    "expand": lambda x: torch.zeros(1, 1).expand(x.shape[0], 1)[:, :, None, None],
    "one_hot": lambda x: F.one_hot(torch.arange(3), x.shape[1]).sum(),
    "reentrant": lambda x: torch.utils.checkpoint.checkpoint(
        torch.cos, x.detach(), use_reentrant=True
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_sizes_and_values_as_numbers(name):
    number = NUMBERS[name]

    class Numbers(Net):
        def forward(self, x):
            return self.relu(self.conv1(x)) + number(x).sum()

    native = made(Numbers)
    assert_same_numbers(fuse(native), native)


# ------------------------------------------------------------------- below what cannot be traced


def body():
    return layers(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = body()
        self.conv, self.relu = conv(3, 4), nn.ReLU()

    def forward(self, x):
        return self.features(x) + self.relu(self.conv(x))[:, :, ::2, ::2]


class Untraceable(Net):
    """Each of its heirs reaches for layers whose results others use too."""

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.go(x)


class ReachesThrough(Untraceable):
    def go(this, x):
        for number, layer in enumerate(this.body.features):
            x = layer(x)
            if number == 0:
                return x


class ReachesIntoList(Untraceable):
    def go(self, x):
        for block in self.blocks:
            return block[0](x)


class CallsGrandchild(Untraceable):
    def go(self, x):
        return self.body.conv(x)


class Inherits(CallsGrandchild):
    pass


class Iterates(Untraceable):
    def go(self, x):
        for name, child in self.named_children():
            if name == "body":
                return child.features[0](x)


class HoldsInList(Untraceable):
    def __init__(self, body):
        super().__init__(body=body)
        self.some = list(body.features)[:1]

    def go(self, x):
        for layer in self.some:
            x = layer(x)
        return x


def go_elsewhere(self, x):
    return self.body.features[0](x)


class MethodFromElsewhere(Untraceable):
    go = go_elsewhere


class AsksByName(Untraceable):
    def go(self, x):
        return getattr(self, "body").features[0](x)  # noqa: B009


class CalledBeside(Untraceable):
    """The block's convolution is followed by the ReLU in one way, by nothing in the other."""

    def __init__(self):
        block = layers(conv(3, 4))
        super().__init__(block=block, whole=layers(block, nn.ReLU()))

    def go(self, x):
        return self.whole(x) + 2 * self.block(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ReachesThrough(body=Body()),
        lambda: ReachesIntoList(blocks=nn.ModuleList([body()])),
        lambda: CallsGrandchild(body=Body()),
        lambda: Inherits(body=Body()),
        lambda: Iterates(body=Body()),
        lambda: AsksByName(body=Body()),
        lambda: HoldsInList(Body()),
        lambda: MethodFromElsewhere(body=Body()),
        CalledBeside,
    ],
    ids=[
        "through",
        "list",
        "grandchild",
        "inherited",
        "iterated",
        "by-name",
        "held",
        "elsewhere",
        "beside",
    ],
)
def test_layers_that_an_untraced_forward_reaches_for(make):
    torch.manual_seed(0)
    native = make()
    assert_same_numbers(fuse(native), native)


class CallsOnly(Untraceable):
    def go(self, x):
        return self.body(x)


def test_what_an_untraced_forward_only_calls_is_fused_inside():
    native = made(CallsOnly, body=Body())
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 2
    assert_same_numbers(fused, native)


# --------------------------------------------------------------------------- grad mode, autocast


class GradBehind(Net):
    def forward(self, x):
        with torch.no_grad():
            h = self.conv1(x)
        return self.relu(self.norm(h))


class GradBefore(Net):
    def forward(self, x):
        h = self.conv1(x)
        with torch.no_grad():
            h = self.relu(h)
        return h + self.conv2(h)


class FrozenBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 4)

    @torch.no_grad()
    def forward(self, x):
        return self.conv(x)


def frozen_and_head():
    return nn.Sequential(FrozenBody(), nn.BatchNorm2d(4), nn.ReLU())


class AutocastBehind(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            h = self.conv1(x)
        return self.relu(self.norm(h.float()))


@pytest.mark.parametrize(
    "make",
    [GradBehind, GradBefore, frozen_and_head, AutocastBehind],
    ids=["behind", "before", "decorated", "autocast"],
)
def test_no_chain_over_a_change_of_mode(make):
    torch.manual_seed(0)
    native = make()
    assert_same_numbers(fuse(native), native)


class WithoutAutocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            h = F.relu(self.conv1(x))
        return h + self.relu(self.conv2(h))


class GradAgain(Net):
    def forward(self, x):
        with torch.enable_grad():
            h = self.conv1(x)
        return self.relu(h)


@pytest.mark.parametrize("cls", [WithoutAutocast, GradAgain, GradBehind])
@pytest.mark.parametrize("fused_in", ["autocast", "no_grad", "inference_mode"])
def test_modes_that_fuse_or_the_model_is_called_in(fused_in, cls):
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    native, x = made(cls), torch.randn(2, 3, 12, 12)
    with contexts[fused_in]():
        fused = fuse(native)
    assert_same_numbers(fused, native)
    for context in contexts.values():
        with context():
            ours, expected = fused(x), native(x)
        assert ours.dtype == expected.dtype and ours.requires_grad == expected.requires_grad
        torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


class FunctionalModes(Net):
    def forward(self, x):
        with torch.no_grad():
            h = F.conv2d(x, self.conv1.weight)
        y = F.conv2d(x, self.conv2.weight[:, :3])
        with torch.no_grad():
            z = F.relu(y)
        return F.relu(h * self.norm.weight[:, None, None]) + F.relu(h) + z + y


def test_no_chain_over_a_change_of_mode_in_compiled_graphs():
    torch._dynamo.reset()
    native = made(FunctionalModes)
    assert_same_numbers(torch.compile(native, backend=in_graphs), native)


def test_sizes_that_data_decides_are_left_to_inductor():
    native, x = layers(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(3, 3, 12, 12)

    def some(x, wanted):
        return native(x[wanted])

    torch._dynamo.reset()
    wanted = torch.tensor([True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        out = torch.compile(some, backend=in_graphs_alone, fullgraph=True)(x, wanted)
    assert_same(out, some(x, wanted), "some")


# ------------------------------------------------------------ state that is read, changed or kept


class OthersMode(Net):
    def forward(self, x):
        x = F.dropout(F.relu(self.conv1(x)), 0.5, self.drop.training)
        return self.relu(x) if self.drop.training else x


class OthersSetting(Net):
    def forward(self, x):
        return F.relu(self.conv1(x)) * self.drop.p


class ByGradMode(Net):
    def forward(self, x):
        h = self.conv1(x)
        return self.relu(h) if torch.is_grad_enabled() else h


@pytest.mark.parametrize("cls", [OthersMode, OthersSetting, ByGradMode])
def test_state_of_other_modules_and_of_pytorch(cls):
    native = made(cls, drop=nn.Dropout(0.5))
    fused = fuse(native)
    assert_same_numbers(fused, native)
    for model in (fused, native):
        model.drop.p = 0.25
    assert_same_numbers(fused, native)
    with torch.no_grad():
        x = torch.randn(2, 3, 12, 12)
        torch.testing.assert_close(fused(x), native(x))


class Settings:
    gain = 2.0


class Configured(Net):
    gain = 1.0

    def __init__(self):
        super().__init__()
        self.settings = Settings()

    def forward(self, x):
        return F.relu(self.conv1(x)) * self.settings.gain


class ClassConstant(Net):
    gain = 1.0

    def forward(self, x):
        return F.relu(self.conv1(x)) * self.gain


def test_settings_may_change_inside():
    native = made(Configured)
    fused = fuse(native)
    fused.settings.gain = native.settings.gain = 3.0
    assert_same_numbers(fused, native)


def test_constants_of_the_class_cannot_be_set_unseen():
    fused = fuse(made(ClassConstant))
    assert len(fusion_report(fused).fused) == 1
    with pytest.raises(AttributeError, match="fuse went by its value in forward"):
        fused.gain = 2.0


ON, TABLE = True, {"on": True}


class Config:
    on = True


class ByGlobal(Net):
    def forward(self, x):
        h = self.conv1(x)
        return self.relu(h) if ON else h


class ByClass(Net):
    def forward(self, x):
        h = self.conv1(x)
        return F.relu(h) if Config.on else h


class ByTable(Net):
    def forward(self, x):
        h = self.conv1(x)
        return F.relu(h) if TABLE["on"] else h


class ByEnvironment(Net):
    def forward(self, x):
        h = self.conv1(x)
        return F.relu(h) if os.environ.get("FASTCLS_TEST") is None else h


def is_on():
    return Config.on


class ByFunction(Net):
    def forward(self, x):
        h = self.conv1(x)
        return F.relu(h) if is_on() else h


def by_closure():
    table = TABLE

    class ByClosure(Net):
        def forward(self, x):
            h = self.conv1(x)
            return F.relu(h) if table["on"] else h

    return ByClosure()


@pytest.mark.parametrize(
    "make", [ByGlobal, ByClass, ByTable, ByEnvironment, ByFunction, by_closure]
)
def test_settings_outside_the_model(make, monkeypatch):
    native = made(make)
    fused = fuse(native)
    assert_same_numbers(fused, native)
    monkeypatch.setitem(globals(), "ON", False)
    monkeypatch.setattr(Config, "on", False)
    monkeypatch.setitem(TABLE, "on", False)
    monkeypatch.setenv("FASTCLS_TEST", "1")
    assert_same_numbers(fused, native)


def test_constants_of_pytorch_are_no_settings():
    class Constants(Net):
        def forward(self, x: torch.Tensor):
            h = F.relu(self.conv1(x)).to(memory_format=torch.contiguous_format)
            return h * math.pi if Kind.A is not Kind.B else h

    native = made(Constants)
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_same_numbers(fused, native)


SIZES = (-1, 8)


def test_numbers_in_globals_are_no_settings():
    class Flat(Net):
        def forward(self, x):
            return F.relu(self.conv1(x)).flatten(1).narrow(1, 0, 8).view(SIZES)

    native = made(Flat)
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_same_numbers(fused, native)


class Kind(enum.Enum):
    A, B = 1, 2


class FunctionInAttribute(Net):
    def __init__(self):
        super().__init__()
        self.act = F.relu

    def forward(self, x):
        return self.pool(self.act(self.conv1(x)))


def test_a_function_in_an_attribute_cannot_be_set_unseen():
    native = made(FunctionInAttribute)
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_same_numbers(fused, native)
    fused.act = F.relu
    with pytest.raises(AttributeError, match="fuse went by its value in forward"):
        fused.act = torch.tanh


class FreezesNorm(Net):
    def forward(self, x):
        h = self.conv1(x)
        self.norm.eval()
        return self.relu(self.norm(h))


def test_modes_that_forward_sets():
    native = made(FreezesNorm)
    fused = fuse(native)
    assert native.norm.training and fused.norm.training
    assert_same_numbers(fused, native)


# What forward does besides: prints, logs, counts.
DONE = []


def counted(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        counted.calls += 1
        return forward(self, x)

    return wrapper


counted.calls = 0


class Prints(Net):
    def forward(self, x):
        print("forward")
        return F.relu(self.conv1(x))


class Warns(Net):
    def forward(self, x):
        warnings.warn("forward", stacklevel=1)
        return F.relu(self.conv1(x))


class Logs(Net):
    def forward(self, x):
        logging.getLogger("fastcls.test").warning("forward")
        return F.relu(self.conv1(x))


class Appends(Net):
    def forward(self, x):
        DONE.append("forward")
        return F.relu(self.conv1(x))


class Counted(Net):
    @counted
    def forward(self, x):
        return F.relu(self.conv1(x))


@pytest.mark.filterwarnings("ignore:forward")
@pytest.mark.parametrize("cls", [Prints, Warns, Logs, Appends, Counted])
def test_what_forward_does_besides(cls, capsys, caplog):
    fused, x = fuse(made(cls)), torch.randn(2, 3, 12, 12)
    caplog.clear(), DONE.clear(), capsys.readouterr()
    calls = counted.calls
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fused(x)
    done = [capsys.readouterr().out, warned, caplog.records, DONE, counted.calls - calls]
    assert sum(map(bool, done)) == 1


class Keeps(Net):
    """Keeps what is before the ReLU: in an attribute, in a list, in a dict that has the key."""

    def __init__(self, how):
        super().__init__()
        self.how, self.kept, self.calls = how, {"list": [], "dict": {"h": None}, "attribute": 0}, 0

    def forward(self, x):
        self.calls += 1
        h = self.conv1(x)
        if self.how == "list":
            self.kept["list"].append(h)
        elif self.how == "dict":
            self.kept["dict"]["h"] = h
        else:
            self.kept["attribute"] = h
        return self.relu(h)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("how", ["list", "dict", "attribute"])
def test_what_forward_keeps(how, inplace):
    native, x = made(lambda: Keeps(how)), torch.randn(2, 3, 12, 12)
    torch.manual_seed(0)
    fused = fuse(made(lambda: Keeps(how)), inplace=inplace)
    assert fused.calls == 0 and fused.kept == native.kept  # the trace left nothing behind
    for model in (native, fused):
        torch.testing.assert_close(model(x), native.relu(native.conv1(x)))
    kept = [m.kept[how] for m in (fused, native)]
    kept = [k[0] if how == "list" else k["h"] if how == "dict" else k for k in kept]
    torch.testing.assert_close(*kept)
    assert fused.calls == 1


class Switched(Net):
    """What it goes by: an attribute, an object, an entry of a dict, another module's attribute."""

    def __init__(self, how):
        super().__init__()
        self.how, self.on, self.settings, self.table = how, True, Settings(), {"on": True}

    def forward(self, x):
        h = self.conv1(x)
        on = {
            "attribute": lambda: self.on,
            "object": lambda: self.settings.gain > 1,
            "entry": lambda: self.table["on"],
            "other": lambda: self.norm.momentum > 0.05,
        }[self.how]()
        return self.relu(h) if on else h


@pytest.mark.parametrize("how", ["attribute", "object", "entry", "other"])
def test_settings_that_chains_of_modules_go_by(how):
    native = made(lambda: Switched(how))
    fused = fuse(native)
    assert_same_numbers(fused, native)
    if how == "attribute":
        fused.on = True
        with pytest.raises(AttributeError, match="fuse went by its value in forward"):
            fused.on = False
        return
    for model in (fused, native):
        model.settings.gain, model.table["on"], model.norm.momentum = 0.5, False, 0.01
    assert_same_numbers(fused, native)


class Momentum(Net):
    """A moving average of weights within forward, as in contrastive learning."""

    def __init__(self, how):
        super().__init__(key=conv())
        self.how = how

    def forward(self, x):
        for own, key in zip(self.conv1.parameters(), self.key.parameters(), strict=True):
            if self.how == "method":
                key.data.mul_(0.5).add_(own.data, alpha=0.5)
            else:
                key.data = 0.5 * key.data + 0.5 * own.data
        return F.relu(self.conv1(x)) * F.relu(self.key(x)).detach()


@pytest.mark.parametrize("how", ["method", "data"])
def test_weights_that_forward_changes(how):
    native = made(lambda: Momentum(how))
    before = native.key.weight.detach().clone()
    fusion_report(native)
    assert_same(native.key.weight, before, "weight")
    fused, x = fuse(native), torch.randn(2, 3, 12, 12)
    assert_same(native.key.weight, before, "weight")
    torch.manual_seed(0)
    other = Momentum(how)
    torch.testing.assert_close(fused(x), other(x))
    assert_same(fused.key.weight, other.key.weight, "weight")


class MaxNorm(nn.Conv2d):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


def test_a_convolution_that_renormalises_its_weight():
    native = layers(MaxNorm(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    assert_same_numbers(fuse(native), native)


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(4, 4)

    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return self.conv(x)


class CallsDoubled(Net):
    def forward(self, x):
        return self.relu(self.inner(F.relu(self.conv1(x))))


def test_a_child_that_does_more_when_it_is_called():
    native = made(CallsDoubled, inner=Doubled())
    assert_same_numbers(fuse(native), native)


def test_hooks_on_all_modules():
    def halved(module, args, out):
        return out / 2 - 1 if isinstance(module, nn.Conv2d) else None

    native = layers(conv(3, 4), nn.ReLU())
    hook = nn.modules.module.register_module_forward_hook(halved)
    try:
        assert_same_numbers(fuse(native), native)
    finally:
        hook.remove()


class Sealed(nn.Module):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("sealed")

    def forward(self, x):
        return x


def test_classes_that_take_no_subclass_come_back():
    native = layers(conv(3, 4), nn.ReLU(), Sealed())
    fused = fuse(native)
    assert [type(m) for m in fused.modules()][-1] is Sealed and type(fused) is nn.Sequential
    assert_same_numbers(fused, native)


def test_a_running_profiler_goes_on():
    profiler = cProfile.Profile()
    profiler.enable()
    fuse(made(TensorsOnly))
    torch.zeros(1).tolist()
    still = sys.getprofile()
    profiler.disable()
    assert still is not None


class Slow(Net):
    def forward(self, x):
        time.sleep(0.01)  # the other thread's turn
        return F.relu(self.conv1(x))


def test_threads_that_fuse_at_once():
    hooks = torch.autograd.graph.saved_tensors_hooks

    def replaced():
        return builtins.isinstance, builtins.hasattr, hooks.__enter__

    before = replaced()
    with ThreadPoolExecutor(2) as pool:
        fused = list(pool.map(fuse, [Slow(), Slow()]))
    assert replaced() == before
    assert all(len(fusion_report(model).fused) == 1 for model in fused)


class DrawsByNumpy(Net):
    def forward(self, x):
        return F.relu(self.conv1(x)) * float(np.random.rand())


def test_numpys_generator_stays_where_it_is():
    before = np.random.get_state()[1].tolist()
    assert not fusion_report(made(DrawsByNumpy)).fused
    assert np.random.get_state()[1].tolist() == before


class Annotated(Net):
    def forward(self, x: "torch.Tensor", scale: Literal[1, 2] = 1) -> Callable[[int], int]:
        return F.relu(self.conv1(x)) * scale


def test_annotations_of_any_kind():
    native = made(Annotated)
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_same_numbers(fused, native)


# -------------------------------------------------------------------- arguments and their types


class OptionalValue(Net):
    def forward(self, x, dim=None):
        return F.relu(self.conv1(x)).sum((2, 3) if dim is None else dim)


class OptionalFactor(Net):
    def forward(self, x, scale=None):
        return F.relu(self.conv1(x)) * (2.0 if scale is None else scale)


@pytest.mark.parametrize("cls, value", [(OptionalValue, 1), (OptionalFactor, 0.5)])
def test_optional_arguments(cls, value):
    native = made(cls)
    fused = fuse(native)
    assert_same_numbers(fused, native)
    assert_same_numbers(fused, native, value)


class OptionalPair(Net):
    def forward(self, x, a=None, b=None):
        h = self.conv1(x)
        return self.relu(h) if (a is None) == (b is None) else h


@pytest.mark.parametrize("given", [(), (1,), (1, 2), (None, 2)])
def test_optional_arguments_that_go_together(given):
    native = made(OptionalPair)
    assert_same_numbers(fuse(native), native, *given)


class RequiredArgument(Net):
    def forward(self, x, skip):
        h = self.conv1(x)
        return h if skip is None else self.relu(h) + skip


class AttributeOfArgument(Net):
    def forward(self, x, batch):
        if (mask := batch.mask) is not None:
            x = x * mask
        return F.relu(self.conv1(x))


class EntryOfArgument(Net):
    def forward(self, x, batch):
        return F.relu(self.conv1(x * (1 if batch.get("mask") is None else batch["mask"])))


class SameArgument(Net):
    def forward(self, x, y):
        return self.relu(self.conv1(x)) + (0 if x is y else 1)


class MatchedArgument(Net):
    def forward(self, x, more):
        match more:
            case {"mask": mask}:
                x = x * mask
        return F.relu(self.conv1(x))


def relu_unless_none(h, y):
    return h if y is None else F.relu(h)


class AsksInFunction(Net):
    def forward(self, x, y):
        return relu_unless_none(self.conv1(x), y)


class TriesAndGoesOn(Net):
    def forward(self, x, y):
        h = self.conv1(x)
        try:
            if y > 0:
                return h
        except Exception:  # fx's, say
            pass
        return self.relu(h)


class TriesBare(Net):
    def forward(self, x, y):
        h = self.conv1(x)
        try:
            len(y)
        except:  # noqa: E722
            return self.relu(h)
        return h


@pytest.mark.parametrize(
    "cls, given",
    [
        (RequiredArgument, None),
        (RequiredArgument, 1.0),
        (AttributeOfArgument, SimpleNamespace(mask=None)),
        (AttributeOfArgument, SimpleNamespace(mask=2.0)),
        (EntryOfArgument, {}),
        (EntryOfArgument, {"mask": 2.0}),
        (SameArgument, 1),
        (MatchedArgument, {"mask": 2.0}),
        (AsksInFunction, None),
        (TriesAndGoesOn, 1),
        (TriesAndGoesOn, 0),
        (TriesBare, [1]),
        (TriesBare, 1),
    ],
)
def test_what_a_trace_would_answer_for_its_stand_in(cls, given):
    native = made(cls)
    fused = fuse(native)
    assert not fusion_report(fused).fused
    assert_same_numbers(fused, native, given)


class AsksOfItsOwn(Net):
    def forward(self, x):
        for block in (self.down, None):
            if block is not None:
                x = block(x)
        h = self.conv1(x) if self.norm is not None and self.up is None else x
        return self.relu(h) if getattr(self, "absent", None) is None else h


def test_asking_what_is_no_argument_hides_nothing():
    native = made(AsksOfItsOwn, down=nn.Identity())
    native.up = None
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_same_numbers(fused, native)


class TensorOrList(Net):
    def forward(self, x):
        return F.relu(self.conv1(x if torch.is_tensor(x) else x[0]))


class ExactType(Net):
    def forward(self, x):
        h = self.relu(self.conv1(x))
        return self.pool(h) if type(x) is torch.Tensor else h


class HasTensors(Net):
    def forward(self, x):
        if hasattr(x, "tensors"):
            x = x.tensors
        return F.relu(self.conv1(x))


class ListOrTensor(Net):
    def forward(self, x):
        if isinstance(x, (list, tuple)):
            x = torch.cat(x)
        return F.relu(self.conv1(x))


@pytest.mark.parametrize("cls", [ExactType, HasTensors, ListOrTensor, TensorOrList])
def test_types_that_are_asked_for(cls):
    native, x = made(cls), torch.randn(2, 3, 12, 12)
    fused = fuse(native)
    assert_same_numbers(fused, native)
    if cls in (ListOrTensor, TensorOrList):
        torch.testing.assert_close(fused([x, x]), native([x, x]))


class TensorsOnly(Net):
    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        return F.relu(self.conv1(x))


def test_asking_for_a_tensor_hides_nothing():
    assert len(fusion_report(fuse(made(TensorsOnly))).fused) == 1


class Double(float):
    """As NumPy's floats are printed."""

    def __repr__(self):
        return f"np.float64({float(self)!r})"


class OddConstant(Net):
    def __init__(self):
        super().__init__()
        self.scale = Double(1.5)

    def forward(self, x):
        return F.relu(self.conv1(x)) * self.scale


def test_floats_of_other_types_in_a_new_forward():
    native = made(OddConstant)
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_same_numbers(fused, native)


# ------------------------------------------------------------------ the order of what is computed


class LateScale(Net):
    def forward(self, x):
        h = F.conv2d(x, self.conv1.weight)
        gamma = self.norm.weight * 2
        mean, var = self.norm.running_mean, self.norm.running_var
        return F.relu(F.batch_norm(h, mean, var, gamma, self.norm.bias))


def test_a_batch_norm_whose_weight_comes_late():
    native = made(LateScale)
    assert_same_numbers(fuse(native), native)
    torch._dynamo.reset()
    assert_same_numbers(torch.compile(native, backend=in_graphs), native)


class ChangesNorm(Net):
    """What batch norm goes by is written to between it and its convolution, or read beside it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.norm.running_mean.fill_(-3)  # ReLU leaves it all

    def forward(self, x):
        gamma, beta = self.norm.weight.detach(), self.norm.bias.detach()
        mean, var = self.norm.running_mean, self.norm.running_var
        if self.how == "module":
            h = self.conv1(x)
            mean.mul_(0.5)
            return self.relu(self.norm(h))
        if self.how == "beside":
            h = self.conv1(x)
            before = mean * 1
            return self.relu(self.norm(h)) + before.sum()
        h = F.conv2d(x, self.conv1.weight)
        if self.how == "method":
            mean.mul_(0.5)
        elif self.how == "item":
            gamma[0] = 2
        elif self.how == "out":
            torch.add(mean, 1, out=mean)
        elif self.how == "operator":
            beta += 1
        elif self.how == "inplace":
            F.relu(mean, True)
        else:
            F.batch_norm(x[:, :1].expand(-1, 4, -1, -1), mean, var, training=True)
        return F.relu(F.batch_norm(h, mean, var, gamma, beta))


@pytest.mark.parametrize("compiled", [False, True], ids=["fuse", "compile"])
@pytest.mark.parametrize(
    "how", ["module", "beside", "method", "item", "out", "operator", "inplace", "statistics"]
)
def test_a_batch_norm_that_forward_changes(how, compiled):
    models = [made(lambda: ChangesNorm(how)) for _ in range(2)]
    native, fused = models[0], models[1]
    if compiled:
        torch._dynamo.reset()
        fused = torch.compile(fused, backend=in_graphs_alone)
    else:
        fused = fuse(fused)
    assert_same_numbers(fused, native)


class FunctionalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


class NormsChild(Net):
    def forward(self, x):
        return F.relu(F.batch_norm(self.child(x), self.norm.running_mean, self.norm.running_var))


def test_a_batch_norm_in_another_forward_than_the_convolution():
    native = made(lambda: NormsChild(child=FunctionalConv()))
    assert_same_numbers(fuse(native), native)


class Augmented(Net):
    """``x += 1`` for a view, an attribute of a tensor and a number."""

    def forward(self, x):
        x = x * 1
        view, transposed, n = x.view(-1), x.mT, x.shape[0]
        m = n
        m += 1
        view += n
        transposed *= m
        return F.relu(self.conv1(x))


def test_augmented_assignments_reach_what_shares_memory():
    native = made(Augmented)
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_same_numbers(fused, native)


class Overwrites(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.fc, self.relu = how, nn.Linear(6, 5), nn.ReLU(inplace=True)

    def forward(self, x):
        with torch.no_grad():
            z = self.fc(x)
        lp = F.log_softmax(z, 1)
        if self.how == "function":
            F.relu(z, inplace=True)
        elif self.how == "module":
            self.relu(z)
        elif self.how == "view":
            z.view(-1).zero_()
        elif self.how == "detached":
            z.detach().zero_()
        else:
            z[:, 0] = 0.0
        return F.nll_loss(lp, torch.arange(4) % 5) + x.sum() * 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["function", "module", "view", "detached", "item"])
def test_logits_that_are_overwritten(how, compiled):
    native = made(lambda: Overwrites(how))
    if compiled:
        torch._dynamo.reset()
        fused = torch.compile(native, backend=in_graphs)
    else:
        fused = fuse(native)
    assert_same_numbers(fused, native, shape=(4, 6))


# ------------------------------------------------------------------------------- other tracers


def test_torch_fx_traces_the_unfused_model_and_fuse_takes_that():
    native = layers(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    fused = fuse(native)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(fused)
    traced = fuse(torch.fx.symbolic_trace(unfuse(fused)))
    assert len(fusion_report(traced).fused) == 1
    assert_same_numbers(traced, native)


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_torch_jit_trace_keeps_gradients():
    native, x = layers(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(2, 3, 12, 12)
    assert_same_numbers(torch.jit.trace(fuse(native), x, check_trace=False), native)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(fuse(native), x)(x), native(x))


# ------------------------------------------------------------------------------- parametrizations


def test_weight_norm_after_fusing_survives_unfusing():
    from torch.nn.utils import parametrize
    from torch.nn.utils.parametrizations import weight_norm

    native, x = layers(conv(3, 4), nn.ReLU()), torch.randn(2, 3, 8, 8)
    fused = fuse(native)
    weight_norm(fused[0])
    expected = fused(x)
    for model in (unfuse(fused), fuse(fused)):
        assert type(model[0]).__mro__[1] is nn.Conv2d
        torch.testing.assert_close(model(x), expected)
        parametrize.remove_parametrizations(model[0], "weight")
        assert type(model[0]) is nn.Conv2d
        torch.testing.assert_close(model(x), expected)


def test_reports_leave_parametrizations_alone():
    from torch.nn.utils.parametrizations import spectral_norm

    model = layers(spectral_norm(conv(3, 4)), nn.ReLU())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fusion_report(model)
    for name, value in model.state_dict().items():
        assert_same(value, state[name], name)


def test_a_layer_of_a_fused_model_does_not_become_native_alone():
    fused = fuse(layers(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU()))
    with pytest.raises(RuntimeError, match="unfuse"):
        fused[0].to_native()
