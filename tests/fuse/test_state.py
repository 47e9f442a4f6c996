"""fuse and state that forward reads, changes or keeps: the same numbers, or left alone."""

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
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fuse_problems import assert_same_numbers, made
from helpers import assert_same
from nets import Net, conv, layers
from torch import nn

from fastcls import fuse, fusion_report


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


class AsksForTensor(Net):
    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        return F.relu(self.conv1(x))


def test_a_running_profiler_goes_on():
    profiler = cProfile.Profile()
    profiler.enable()
    fuse(made(AsksForTensor))
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
