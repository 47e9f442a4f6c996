"""fuse and arguments of forward: what a trace would answer for its stand-ins."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fuse_problems import assert_same_numbers, made
from nets import Net
from torch import nn

from fastcls import fuse, fusion_report

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
