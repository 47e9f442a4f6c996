"""fuse and changes of grad mode and autocast within forward."""

import pytest
import torch
import torch.nn.functional as F
from fuse_problems import assert_same_numbers, in_graphs_alone, made
from helpers import assert_same
from nets import Net, conv, layers
from torch import nn

from fastcls import fuse
from fastcls.fusing.dynamo import fastcls as in_graphs


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
