"""fuse below what cannot be traced, and what other tracers make of a fused model."""

import pytest
import torch
from fuse_problems import assert_same_numbers, made
from helpers import assert_same
from nets import Net, conv, layers
from torch import nn

from fastcls import fuse, fusion_report, unfuse


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
