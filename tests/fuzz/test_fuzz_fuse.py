"""fuse on drawn nets: outputs and gradients stay, and the report tells what runs."""

import linecache
import operator
import re

import pytest
import torch
import torch.nn.functional as F
from fuzz.drawing import draws, one_in, one_of
from helpers import run_model
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn

from fastcls import fuse, fusion_report, unfuse
from fastcls.fusing import choice

CHANNELS = 3  # of every value in a net: any step can follow any other


class Net(nn.Module):
    """Modules that a drawn ``forward`` may call, some of them twice."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 2, padding=1, bias=False)
        self.conv3 = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.grouped = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
        self.norm1, self.norm2 = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS, affine=False)
        self.relu, self.relu_inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2, 1)
        self.pool_padded = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.mean = nn.AvgPool2d(2, 1)
        self.block1 = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU()
        )
        self.block2 = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.dropout = nn.Dropout2d(0.3)


# What a line of forward may do with a value x; y is another one.
CALLS = [
    *(f"self.{name}({{x}})" for name in dict(Net().named_children())),
    "F.relu({x})",
    "F.relu({x}, inplace=True)",
    "torch.relu({x})",
    "{x}.relu()",
    "{x}.relu_()",
    "F.max_pool2d({x}, 2, 1)",
    "torch.max_pool2d({x}, kernel_size=3, stride=1, padding=1)",
    "F.conv2d({x}, self.conv1.weight, self.conv1.bias, padding=1)",
    "F.batch_norm({x}, self.norm1.running_mean, self.norm1.running_var, training=self.training)",
    "F.dropout({x}, 0.5, self.training)",
    "F.interpolate({x}, (6, 6)) + F.interpolate({y}, (6, 6))",
    "{x} * 2",
    "{x}.mul_(2)",
    "operator.iadd({x}.view(-1), 1).mean() + {x}",
    "self.norm1.running_mean.mul_(0.9).mean() + {x}",
    "{x}.detach() + {x}",
    "{x} if self.training else {x} - 1",
]
# A chain is more likely than by chance.
CHAINS = [
    ["self.{conv}({x})", "self.relu({x})", "self.pool({x})"],
    ["self.{conv}({x})", "F.relu({x})", "F.max_pool2d({x}, 2)"],
    ["self.{conv}({x})", "self.norm1({x})", "F.relu({x}, inplace=True)"],
    ["self.{conv}({x})", "self.pool_padded({x})", "{x}.relu()"],
]


@st.composite
def forwards(draw):
    """The lines of a ``forward``: each makes a new value, mostly of the last one."""
    lines, calls = [], []
    for _ in range(draw(st.integers(1, 4))):
        if one_in(draw, 2):
            chain = one_of(draw, *CHAINS)
            head = one_of(draw, "conv1", "conv2", "conv3")
            calls += [call.replace("{conv}", head) for call in chain]
        else:
            calls.append(one_of(draw, *CALLS))
    for i, call in enumerate(calls):
        x, y = (i - draw(st.integers(0, i)) if one_in(draw, 5) else i for _ in "xy")
        lines.append(f"v{i + 1} = {call.format(x=f'v{x}', y=f'v{y}')}")
    result = f"v{len(calls)}"
    if one_in(draw, 5):
        result += f".mean() + v{draw(st.integers(1, len(calls)))}"
    return [*lines, f"return {result}"]


def net_with(lines, seed):
    """A net with this ``forward``; its source can be read, like that of a file."""
    source = "class Drawn(Net):\n    def forward(self, v0):\n"
    source += "".join(f"        {line}\n" for line in lines)
    file = f"<drawn net {seed}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {"Net": Net, "F": F, "torch": torch, "operator": operator, "__name__": __name__}
    exec(compile(source, file, "exec"), scope)
    torch.manual_seed(seed)
    net = scope["Drawn"]().double()
    for name in set(dict(net.named_children())) - set(re.findall(r"self\.(\w+)", source)):
        delattr(net, name)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return net


def assert_equal_numbers(ours, native, x):
    """In training and in evaluation; the fused forward ops of the latter."""
    for train in (True, False):
        results, ops = run_model(ours, x, train)
        expected, _ = run_model(native, x, train)
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    return [op for op in ops if op.endswith("forward")]


@draws(40)
@given(lines=forwards(), seed=st.integers(0, 1000), always=st.booleans())
def test_fuse(lines, seed, always):
    native, twin = net_with(lines, seed), net_with(lines, seed)
    x = torch.randn(2, CHANNELS, 7, 8, dtype=torch.float64)
    try:
        run_model(twin, x, False)
        run_model(twin, x, True)
    except RuntimeError:  # a value is overwritten that PyTorch's backward pass needs, or too small
        event("native error")
        return
    twin = net_with(lines, seed)
    with pytest.MonkeyPatch.context() as patch:
        if always:  # float64 is given to the fused ops for the test alone
            patch.setattr(choice, "conv_block_pays", lambda *_: True)
        fused = fuse(native)
        ops = assert_equal_numbers(fused, twin, x)
    report = fusion_report(fused)
    event(f"chains fused: {len(report.fused)}")
    assert str(report) == str(fusion_report(native)) == str(fusion_report(fuse(fused)))
    heads = [chain.where.split(".")[0] for chain in report.fused]  # "": a function's
    calls = sum("".join(lines).count(f"self.{head}(") if head else 1 for head in heads)
    assert len(ops) == (calls if always else 0), report
    pairs = zip(fused.parameters(), native.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    back = unfuse(fused)
    assert repr(back) == repr(native) and type(back) is type(native)
    assert not assert_equal_numbers(back, twin, x)
