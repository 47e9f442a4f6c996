"""fuse, unfuse and fusion_report: equal numbers, the same parameters, and nothing unproved."""

import copy
import gc
import itertools
import pickle
import random
import re
import threading
import warnings
import weakref

import nets
import pytest
import torch
import torch.nn.functional as F
from helpers import Calls, assert_same, run_model
from nets import Net, conv, layers
from torch import nn

from fastcls import FusedConvBlock, FusedCrossEntropyLoss, functional, fuse, fusion_report, unfuse
from fastcls.fusing import choice


def images(model, n=3):
    g = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    return torch.randn(n, *model.image, generator=g, dtype=torch.float64).to(dtype)


def assert_equal_numbers(ours, native, x, modes=(True, False)):
    """Outputs and gradients in both modes; the fused ops that ``ours`` called in the last one."""
    for train in modes:
        (results, ops), (expected, _) = run_model(ours, x, train), run_model(native, x, train)
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return ops


def always_fused(monkeypatch):
    monkeypatch.setattr(choice, "conv_block_pays", lambda *_: True)


FUSED = [
    # model, chains that are fused, ops of one evaluation
    (nets.MnistExample, ["Conv2d → relu", "Conv2d → relu → max_pool2d"], 2),
    (nets.LeNet, ["Conv2d → relu → MaxPool2d"] * 2, 2),
    (nets.Functions, ["Conv2d → relu → max_pool2d"] * 2, 2),
    (nets.InPlace, ["Conv2d → relu → max_pool2d", "Conv2d → relu"], 2),
    (nets.PoolFirst, ["Conv2d → max_pool2d → relu", "Conv2d → MaxPool2d → relu"], 2),
    (nets.Attributes, ["Conv2d → ReLU → MaxPool2d"], 1),
    (
        nets.FunctionalConv,
        ["conv2d → relu → max_pool2d", "conv2d → batch_norm → relu → max_pool2d"],
        2,
    ),
    (nets.Dropouts, ["Conv2d → relu → max_pool2d", "Conv2d → relu"], 2),
    (nets.Normed, ["Conv2d → BatchNorm2d → relu → max_pool2d"], 1),
    (nets.Across, ["Conv2d → BatchNorm2d → relu → MaxPool2d", "Conv2d → relu → max_pool2d"], 2),
    (nets.Optional, ["Conv2d → relu → max_pool2d"], 1),
    (
        nets.Losses,
        [
            "CrossEntropyLoss",
            "LogSoftmax → NLLLoss",
            "cross_entropy",
            *["log_softmax → nll_loss"] * 3,
        ],
        6,
    ),
    (lambda: layers(conv(), nn.ReLU()), ["Conv2d → ReLU"], 1),
    (
        lambda: layers(conv(), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)),
        ["Conv2d → ReLU → MaxPool2d"],
        1,
    ),
    (
        lambda: layers(conv(), nn.MaxPool2d(2, ceil_mode=True), nn.ReLU()),
        ["Conv2d → MaxPool2d → ReLU"],
        1,
    ),
    (lambda: layers(conv(padding_mode="reflect"), nn.MaxPool2d(2)), ["Conv2d → MaxPool2d"], 1),
    (
        lambda: layers(conv(bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        ["Conv2d → BatchNorm2d → ReLU → MaxPool2d"],
        1,
    ),
    (
        lambda: layers(conv(), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Dropout(0.5)),
        ["Conv2d → BatchNorm2d → ReLU"],
        1,
    ),
    # A dilated pool stays, the ReLU before it does not; one ReLU may serve many chains.
    (lambda: layers(conv(), nn.ReLU(), nn.MaxPool2d(2, dilation=2)), ["Conv2d → ReLU"], 1),
    (
        lambda: layers(conv(3, 4), r := nn.ReLU(), conv(4, 4), r, nn.MaxPool2d(2)),
        ["Conv2d → ReLU", "Conv2d → ReLU → MaxPool2d"],
        2,
    ),
]
every_net = pytest.mark.parametrize("make, chains, ops", FUSED)


def made(make):
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if (
            isinstance(module, nn.BatchNorm2d) and module.track_running_stats
        ):  # statistics that do something
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model


@every_net
def test_fused_model_is_the_native_one(make, chains, ops, monkeypatch):
    native = made(make)
    before = repr(native)
    fused = fuse(native)
    assert repr(native) == before
    assert sorted(row.chain for row in fusion_report(fused).fused) == sorted(chains)
    assert str(fusion_report(native)) == str(fusion_report(fused))
    # Training first: batch statistics move, and evaluation must see them moved.
    twin = copy.deepcopy(native)
    always_fused(monkeypatch)
    forward_ops = [
        op for op in assert_equal_numbers(fused, twin, images(native)) if "forward" in op
    ]
    assert len(forward_ops) == ops


@every_net
def test_parameters_and_buffers_are_the_same_objects(make, chains, ops):
    native = made(make).requires_grad_(False)
    fused = fuse(native.eval())
    assert list(fused.state_dict()) == list(native.state_dict())
    for tensors in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(fused, tensors)(), getattr(native, tensors)(), strict=True)
        assert all(a[0] == b[0] and a[1] is b[1] for a, b in pairs)
    assert isinstance(fused, type(native))
    names = [(n, m.training) for n, m in native.named_modules()]
    assert names == [(n, m.training) for n, m in fused.named_modules()]
    assert not any(p.requires_grad for p in fused.parameters())


@every_net
def test_unfuse_brings_the_original_back(make, chains, ops):
    native = made(make)
    back = unfuse(fuse(native))
    assert repr(back) == repr(native)
    pairs = list(zip(back.modules(), native.modules(), strict=True))
    assert all(type(a) is type(b) and vars(a).keys() == vars(b).keys() for a, b in pairs)
    assert all(a is b for a, b in zip(back.parameters(), native.parameters(), strict=True))
    (ours, fused_ops), (expected, _) = (run_model(m, images(native), False) for m in (back, native))
    assert not fused_ops
    for a, b in zip(ours, expected, strict=True):
        assert_same(a, b, "unfused")


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
@every_net
def test_copies_are_fused_and_have_their_own_parameters(make, chains, ops, duplicate, monkeypatch):
    always_fused(monkeypatch)
    fused = fuse(made(make))
    twin = duplicate(fused)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in fused.parameters()}
    assert str(fusion_report(twin)) == str(fusion_report(fused))
    for train in (False, True):
        (ours, our_ops), (expected, expected_ops) = (
            run_model(m, images(fused), train) for m in (twin, fused)
        )
        assert our_ops == expected_ops and (our_ops or train)
        for a, b in zip(ours, expected, strict=True):
            assert_same(a, b, "copy")
    assert repr(unfuse(twin)) == repr(unfuse(fused))


# ---------------------------------------------------------------------------------- left alone


class UsedTwice(Net):
    def forward(self, x):
        x = self.conv1(x)
        return F.relu(x) + x


class Overwritten(Net):
    """The ReLU's result is not used: it works through the alias."""

    def forward(self, x):
        x = self.conv1(x)
        F.relu_(x)
        return self.pool(x)


class CalledTwice(Net):
    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv2(F.relu(self.conv1(x))))))


class Indices(Net):
    def forward(self, x):
        x, indices = F.max_pool2d(self.conv1(x), 2, return_indices=True)
        return x + indices


class Computed(Net):
    def forward(self, x):
        return F.max_pool2d(self.conv1(x), x.shape[2] // 4)


class Counting(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.conv1(x))


class Random(Net):
    def forward(self, x):
        x = F.relu(self.conv1(x))
        return x if random.random() < 2 else x + 1


class Noise(Net):
    def forward(self, x):
        return F.relu(self.conv1(x)) + torch.ones(1)


class NoGrad(Net):
    def forward(self, x):
        with torch.no_grad():
            x = F.relu(self.conv1(x))
        return self.conv2(x)


class Offloaded(Net):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return F.relu(self.conv1(x))


class AsksForType(Net):
    def forward(self, x):
        x = self.conv1(x if isinstance(x, torch.Tensor) else x[0])
        return F.relu(x)


class AsksForArgument(Net):
    def forward(self, x, skip=None):
        x = self.conv1(x)
        return F.relu(x) if skip is None else x


class AnyArguments(Net):
    def forward(self, *inputs):
        return F.relu(self.conv1(inputs[0]))


class InTrainingOnly(Net):
    def forward(self, x):
        x = self.conv1(x)
        return F.relu(x) if self.training else x


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


class NormTwice(Net):
    def forward(self, x):
        return self.norm(F.relu(self.norm(self.conv1(x))))


class ReluElsewhere(Net):
    """The Sequential's ReLU is somebody else's too, and no forward of a Sequential is rewritten."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(conv(), self.relu)

    def forward(self, x):
        return self.relu(self.block(x) - 1)


def hooked(register, index=0):
    def make():
        model = layers(conv(), nn.ReLU(), nn.MaxPool2d(2))
        getattr(model[index], register)(lambda *_: None)
        return model

    return make


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return layers(nn.utils.weight_norm(conv()), nn.ReLU())


def replaced_forward():
    model = layers(conv(), nn.ReLU())
    native = model[0].forward
    model[0].forward = lambda x: native(x) * 2
    return model


LEFT_ALONE = [
    (UsedTwice, "result is used 2 times"),
    (Overwritten, "result is used 2 times"),
    (CalledTwice, "Conv2d is called 2 times"),
    (Indices, "returns indices"),
    (Computed, "kernel_size of max_pool2d is computed in forward"),
    (Counting, "changes attributes"),
    (Random, "draws random numbers"),
    (Noise, "makes a tensor of its own"),
    (NoGrad, "changes autocast or grad mode"),
    (Offloaded, "saved-tensor hooks"),
    (AsksForType, "asks for the type of its arguments"),
    (AsksForArgument, "asks `skip is None`"),
    (AnyArguments, "any number of arguments"),
    (InTrainingOnly, "training and evaluation differ"),
    (NormTwice, "BatchNorm2d norm is called elsewhere too"),
    (ReluElsewhere, "ReLU block.1 is called elsewhere too"),
    (hooked("register_forward_hook"), "Conv2d has hooks"),
    (hooked("register_forward_pre_hook"), "Conv2d has hooks"),
    (hooked("register_full_backward_hook"), "Conv2d has hooks"),
    (hooked("register_forward_hook", 1), "ReLU has hooks"),
    (old_weight_norm, "Conv2d has hooks"),
    (replaced_forward, "forward of this Conv2d was replaced"),
    (lambda: layers(nn.utils.parametrizations.weight_norm(conv()), nn.ReLU()), "parametrized"),
    (lambda: layers(conv(4, 4, groups=2), nn.ReLU(), image=(4, 9, 9)), "grouped convolutions"),
    (lambda: layers(conv(), nn.MaxPool2d(2, dilation=2)), "max-pool has dilation 2"),
    (lambda: layers(conv(), nn.BatchNorm2d(4)), "no ReLU or max-pool follows|leaves the model"),
    (
        lambda: layers(conv(), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()),
        "keeps no running statistics",
    ),
    (lambda: layers(conv(), nn.LeakyReLU(), nn.MaxPool2d(2)), "no ReLU or max-pool follows"),
    (lambda: layers(OwnConv(3, 4, 3), nn.Flatten()), "no ReLU or max-pool follows"),
    (lambda: layers(conv(), nn.ReLU(), conv(4, 4), nn.Tanh()), "no ReLU or max-pool follows"),
    (lambda: layers(conv()), "its result leaves the model"),
    (lambda: layers(conv(), nn.Flatten(), nn.LogSoftmax(1)), "its result leaves the model"),
]


@pytest.mark.parametrize("make, reason", LEFT_ALONE)
def test_what_is_not_proved_stays_and_is_named(make, reason):
    native = made(make)
    fused = fuse(native)
    report = fusion_report(fused)
    assert re.search(reason, str(report)), str(report)
    told = [row for row in report if not row.fused and row.reason]
    assert told
    assert_equal_numbers(fused, native, images(native))


def test_fuse_warns_where_it_fuses_nothing():
    with pytest.warns(UserWarning, match="in Sequential was fused: 0: Conv2d: .* leaves the model"):
        fuse(layers(conv()))
    with pytest.warns(UserWarning, match="in Linear was fused: it has no such chain"):
        fuse(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(fuse(layers(conv(), nn.ReLU(), nn.Linear(2, 2))))


def test_a_lazy_convolution_is_fused_once_it_has_its_weight():
    model = layers(nn.LazyConv2d(4, 3), nn.ReLU())
    assert "has no weight before the model has run once" in str(fusion_report(model))
    model(torch.randn(1, 3, 9, 9))
    assert len(fusion_report(fuse(model)).fused) == 1


def test_a_cropped_chain_tells_why():
    (row,) = fusion_report(layers(conv(), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)))
    assert row == ("0", "Conv2d → ReLU", True, "max-pool returns indices")


def test_subclasses_of_a_convolution_are_looked_into():
    native = made(lambda: layers(OwnConv(3, 4, 3), nn.ReLU()))
    assert [row.fused for row in fusion_report(native)] == [False]


# ------------------------------------------------------------------------------- not traceable


class Untraceable(Net):
    def __init__(self):
        super().__init__(
            features=nn.Sequential(conv(3, 4), nn.ReLU(), nn.MaxPool2d(2)),
            opened=nn.Sequential(conv(4, 4), nn.ReLU()),
        )

    def forward(self, x):
        x = self.features(x)
        if x.sum() > 0:
            x = x + 1
        for layer in self.opened:
            x = layer(x) - 0.1
        return F.relu(self.conv2(x))


def test_models_that_cannot_be_traced_are_rewritten_module_by_module(monkeypatch):
    always_fused(monkeypatch)
    native = made(Untraceable)
    fused = fuse(native)
    report = fusion_report(fused)
    assert [row.where for row in report.fused] == ["features.0"]
    assert "control flow" in report.notes[0] and "the model was not traced" in report.notes[0]
    reasons = {row.where: row.reason for row in report}
    assert "may call it at any time" in reasons["opened.0"]
    assert reasons["conv1"] == "no forward that was traced calls it"
    assert assert_equal_numbers(fused, native, images(native)).count("conv_block_forward") == 1


# ---------------------------------------------------------------------------------- after fuse


def test_report_prints_as_a_table():
    text = str(fusion_report(layers(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4), nn.Tanh())))
    lines = text.splitlines()
    assert re.match(r"module +chain +fused +reason", lines[0])
    assert re.match(r"0 +Conv2d → ReLU → MaxPool2d +yes$", lines[2])
    assert re.match(r"3 +Conv2d +no +no ReLU or max-pool follows", lines[3])
    assert lines[4] == "1 of 2 chains fused"


def test_optimisers_made_before_go_on():
    losses = []
    for prepare in (fuse, lambda model: model):
        model = made(nets.LeNet)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model = prepare(model)
        losses.append([])
        for _ in range(4):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(images(model, 8)), torch.arange(8))
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_frozen_batch_norm_is_folded_in_training(monkeypatch):
    always_fused(monkeypatch)
    native = made(nets.Normed)
    fused = fuse(native)
    for model in (native, fused):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    torch.testing.assert_close(fused(images(native)), native(images(native)), rtol=1e-4, atol=1e-5)
    with Calls() as calls:
        fused(images(native))
    assert calls.ops == ["conv_block_forward"]


def test_folding_follows_the_weights_and_leaves_them_alone():
    native = made(nets.Normed).eval()
    fused, x = fuse(native), images(native)
    state = copy.deepcopy(native.state_dict())
    first = fused(x)
    for name, value in native.state_dict().items():
        assert_same(value, state[name], name)
    with torch.no_grad():
        native.norm.weight.mul_(-2)
        native.conv1.weight.add_(0.1)
        native.norm.running_var.mul_(3)
    torch.testing.assert_close(fused(x), native(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fused(x), first)


def test_replacing_a_folded_batch_norm_is_an_error():
    fused = fuse(made(lambda: layers(conv(), nn.BatchNorm2d(4), nn.ReLU())))
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    with pytest.raises(RuntimeError, match="was replaced, or not copied along; unfuse the model"):
        fused(torch.randn(1, 3, 8, 8))


def normed():
    return made(lambda: layers(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(12, 999)))


def test_a_batch_norm_that_is_replaced_and_kept():
    fused = fuse(normed())
    kept, fused[1] = fused[1], nn.BatchNorm2d(4)
    with pytest.raises(RuntimeError, match="unfuse the model"):
        fused(images(fused))
    assert kept is not fused[1]


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_a_convolution_copied_without_its_batch_norm_says_so(duplicate):
    fused, x = fuse(normed()), images(normed())
    one_by_one = nn.Sequential(*(duplicate(layer) for layer in fused))
    with pytest.raises(RuntimeError, match="not copied along; unfuse the model"):
        one_by_one(x)
    together = nn.Sequential(*duplicate(list(fused)))
    for model in (fused, together):
        model[1].weight.data.fill_(3)
    copy.copy(together[1])  # ties nothing
    assert_equal_numbers(together, fused, x)


def test_a_convolution_holds_no_more_than_itself():
    native = normed()
    sizes = [len(pickle.dumps(model[0])) for model in (native, fuse(native))]
    assert sizes[1] < sizes[0] + 1000


def test_a_fused_model_is_freed_with_its_last_reference():
    fused = fuse(normed())
    fused(images(fused)).sum().backward()
    model = weakref.ref(fused)
    collects = gc.isenabled()
    gc.disable()
    try:
        del fused
        assert model() is None
    finally:
        if collects:
            gc.enable()


@pytest.mark.parametrize(
    "duplicate",
    [lambda m: m, copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["itself", "copy", "deepcopy", "pickle"],
)
@pytest.mark.parametrize(
    "at, layer",
    [(0, nn.Conv2d(1, 4, 3)), (1, nn.GELU()), (2, nn.AvgPool2d(2)), (4, nn.Identity())],
    ids=["conv", "relu", "pool", "relu of the second"],
)
def test_a_layer_of_a_chain_that_is_replaced(at, layer, duplicate):
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.ReLU()
    native, x = nn.Sequential(*layers), torch.randn(2, 1, 9, 9)
    fused = duplicate(fuse(native))
    fused[1] = Wrapped(fused[1])  # still there
    torch.testing.assert_close(fused(x), native(x))
    fused[at] = layer
    with pytest.raises(RuntimeError, match="was replaced; unfuse the model before"):
        fused(x)
    native[at] = layer
    for again in (unfuse(fused), fuse(fused)):
        torch.testing.assert_close(again(x), native(x))


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def test_layers_outlive_their_model():
    fused, native = fuse(normed()), normed()
    rest = nn.Sequential(*list(fused.children())[:-1])
    del fused
    assert_equal_numbers(rest, nn.Sequential(*native[:-1]), images(native))


class Scaled(Net):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.scale = 2.0

    def forward(self, x):
        return F.relu(self.conv1(x)) * self.scale


def test_setting_what_was_written_into_a_forward_is_an_error():
    model = fuse(made(Scaled))
    with pytest.raises(AttributeError, match=r"Scaled\.scale: fuse went by its value in forward"):
        model.scale = 3.0
    model.something_else = 3.0
    back = unfuse(model)
    back.scale = 3.0
    assert_equal_numbers(fuse(back), back, images(back))


def test_a_new_forward_keeps_its_signature_and_the_methods():
    model = fuse(made(nets.Optional))
    x = images(model)
    assert_same(model(x, scale=4.0), 2 * model(x), "keyword argument")
    assert type(model).__name__ == "Optional" and isinstance(model, nets.Optional)


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace(inplace):
    model = made(nets.LeNet)
    fused = fuse(model, inplace=inplace)
    assert (fused is model) == inplace
    assert isinstance(model.conv1, FusedConvBlock) == inplace
    back = unfuse(fused, inplace=inplace)
    assert (back is fused) == inplace
    assert type(back) is nets.LeNet and type(back.conv1) is nn.Conv2d


def test_fusing_twice_is_fusing_once():
    once = fuse(made(nets.Across))
    twice = fuse(once)
    assert str(fusion_report(twice)) == str(fusion_report(once))
    assert repr(twice) == repr(once)
    assert repr(unfuse(twice)) == repr(made(nets.Across))


def test_blocks_made_by_hand_stay():
    model = layers(FusedConvBlock(3, 4, 3), nn.ReLU(), FusedCrossEntropyLoss())
    fused = fuse(model)
    for m in (fused, unfuse(fused)):
        assert repr(m) == repr(model)
    rows = [(row.where, row.fused, row.reason) for row in fusion_report(fused)]
    assert rows == [("0", True, "fused already"), ("2", True, "fused already")]


def test_a_batch_norm_is_told_to_gain_in_evaluation_alone():
    model = layers(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    first, second = fusion_report(model)
    assert first.fused and "in evaluation alone" in first.reason
    assert second.fused and not second.reason


def test_a_loss_by_itself():
    loss = fuse(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert isinstance(loss, FusedCrossEntropyLoss)
    logits, target = torch.randn(8, 10), torch.arange(8)
    expected = F.cross_entropy(logits, target, label_smoothing=0.1)
    torch.testing.assert_close(loss(logits, target), expected)


@pytest.mark.parametrize(
    "wrapped, name",
    [
        (lambda: torch.compile(nets.LeNet()), "OptimizedModule"),
        (lambda: nn.DataParallel(nets.LeNet()), "DataParallel"),
        (lambda: torch.jit.script(layers(conv(), nn.ReLU())), "RecursiveScriptModule"),
    ],
    ids=["compile", "parallel", "script"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_wrapped_models_are_refused(wrapped, name):
    model = wrapped()
    for function in (fuse, unfuse, fusion_report):
        with pytest.raises(
            TypeError, match=f"{function.__name__}: model must not be .* got {name}"
        ):
            function(model)


def test_a_model_that_cannot_be_copied_is_told_of_inplace():
    model = made(nets.LeNet)
    model.lock = threading.Lock()
    for function in (fuse, unfuse):
        message = rf"{function.__name__}: LeNet cannot be copied \(.*\); inplace=True"
        with pytest.raises(TypeError, match=message):
            function(model)
    with pytest.raises(TypeError, match=r"fusion_report: LeNet cannot be copied \(.*\)$"):
        fusion_report(model)
    assert len(fusion_report(fuse(model, inplace=True)).fused) == 2


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"fuse: model must be an nn\.Module, got function"):
        fuse(lambda x: x)


@pytest.mark.parametrize("make", [nets.LeNet, nets.Normed])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_another_dtype(make, dtype):
    fused = fuse(made(make)).to(dtype)
    native = made(make).to(dtype)
    assert all(p.dtype == dtype for p in fused.parameters())
    x = images(native)
    tolerance = (
        {"rtol": 1e-7, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.1}
    )
    torch.testing.assert_close(fused(x), native(x), **tolerance)


def test_channels_last(monkeypatch):
    always_fused(monkeypatch)
    native = made(nets.Functions).to(memory_format=torch.channels_last)
    fused = fuse(native)
    x = images(native).to(memory_format=torch.channels_last)
    assert fused(x).is_contiguous(memory_format=torch.channels_last)
    assert_equal_numbers(fused, native, x)


def test_on_a_device(device):
    native = made(nets.Normed).to(device)
    fused, x = fuse(native), images(native).to(device)
    torch.testing.assert_close(fused(x), native(x), rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize("pays", [True, False], ids=["fused", "native"])
@pytest.mark.parametrize(
    "activation, pool",
    list(itertools.product(["relu", None], [None, {"pool_size": 3, "pool_stride": 2}])),
)
def test_both_choices_give_the_same_numbers(pays, activation, pool, monkeypatch):
    monkeypatch.setattr(choice, "conv_block_pays", lambda *_: pays)
    pool = pool or {"pool_size": None}
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-2, 3, s, generator=g).float() for s in [(2, 5, 9, 9), (6, 5, 3, 3)])
    w.requires_grad_()
    results = []
    for function in (choice.conv_block, choice.functional.conv_block):
        out = function(x, w, torch.ones(6), padding=1, activation=activation, **pool)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), w)))
    for ours, expected in zip(*results, strict=True):
        assert_same(ours, expected, "choice")


class OverwritesPooled(Net):
    def forward(self, x):
        x = F.dropout(self.pool(F.relu(self.conv1(x))), 0.0, self.training, inplace=True)
        return x.mul_(2).flatten(1)


@pytest.mark.parametrize("pays", [True, False], ids=["fused", "native"])
def test_what_follows_a_pool_may_overwrite_its_result(pays, monkeypatch):
    monkeypatch.setattr(choice, "conv_block_pays", lambda *_: pays)
    native = OverwritesPooled()
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_equal_numbers(fused, native, images(native))


@pytest.mark.parametrize(
    "shape, weight, pool, needs_grad, pays",
    [
        # First layers, without a pool.
        ((8, 3, 32, 32), (16, 3, 3, 3), None, True, True),
        ((8, 1, 28, 28), (32, 1, 3, 3), None, False, False),
        # Without a pool: large maps, and for gradients many channels.
        ((8, 64, 32, 32), (64, 64, 3, 3), None, True, True),
        ((8, 32, 32, 32), (64, 32, 3, 3), None, True, False),
        ((8, 32, 32, 32), (64, 32, 3, 3), None, False, True),
        ((1, 512, 14, 14), (512, 512, 3, 3), None, True, False),
        # Inference by Winograd's algorithm: all but a large weight on a tiny map.
        ((4, 512, 14, 14), (512, 512, 3, 3), None, False, True),
        ((1, 512, 14, 14), (512, 512, 3, 3), None, False, False),
        ((2, 256, 14, 14), (512, 256, 3, 3), 3, False, False),
        # With a pool: all but a large weight on a small map.
        ((1, 32, 8, 8), (64, 32, 3, 3), 2, True, True),
        ((1, 512, 14, 14), (512, 512, 3, 3), 2, False, False),
        ((1, 512, 14, 14), (512, 512, 3, 3), 2, True, False),
        ((4, 512, 14, 14), (512, 512, 3, 3), 2, True, True),
        # No fast kernel: a window of more than 16 places, an image of more than 2^24 elements.
        ((2, 32, 64, 64), (32, 32, 3, 3), (4, 4), True, True),
        ((2, 32, 64, 64), (32, 32, 3, 3), 5, True, False),
        ((2, 32, 64, 64), (32, 32, 3, 3), (17, 1), False, False),
        ((1, 3, 2400, 2400), (16, 3, 3, 3), 2, True, False),
    ],
)
def test_choice_by_sizes(shape, weight, pool, needs_grad, pays):
    x, w = torch.empty(shape, device="meta"), torch.empty(weight, device="meta")
    assert choice.conv_block_pays(x, w, pool, needs_grad) == pays
    assert not choice.conv_block_pays(x.double(), w.double(), pool, needs_grad)


@pytest.mark.parametrize("path", ["fast", "general"])
def test_choice_knows_what_has_a_fast_kernel(path):
    limits = choice.MOST_PLACES, choice.MOST_ELEMENTS
    places, elements = limits if path == "fast" else (n + 1 for n in limits)
    w = torch.empty(16, 1, 1, 1)
    for x, window in (
        (torch.empty(1, 1, 40, 40), (places, 1)),
        (torch.empty(1, 1, 1, elements - 1), (1, 2)),
    ):
        expected = "general" if path == "general" or not choice.HAS_VECTORS else "direct"
        assert functional.conv_block_path(x, w, pool_size=window) == expected
        assert choice.has_fast_kernel(x, window, "cpu") == (expected == "direct")


def test_choice_of_a_strided_convolution():
    x, w = torch.empty(8, 16, 28, 28), torch.empty(32, 16, 3, 3)
    for device_type, pays in (("cpu", True), ("cuda", False)):
        for grad in (False, True):
            arguments = dict(dense=False, device_type=device_type, strided_grad=grad)
            ours = choice.conv_block_pays(x, w, 2, True, **arguments)
            assert ours == (pays or not grad)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "shape, weight, pool, needs_grad",
    [
        ((8, 64, 32, 32), (64, 64, 3, 3), None, True),
        ((8, 32, 32, 32), (64, 32, 3, 3), None, False),
        ((4, 512, 14, 14), (512, 512, 3, 3), 2, True),
        ((4, 512, 14, 14), (512, 512, 3, 3), 2, False),
    ],
)
def test_choice_in_bfloat16(shape, weight, pool, needs_grad, autocast, monkeypatch):
    dtype = torch.float32 if autocast else torch.bfloat16
    x, w = torch.empty(shape, dtype=dtype), torch.empty(weight, device="meta")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for pairs in (False, True):
            monkeypatch.setattr(choice, "HAS_PAIRS", pairs)
            assert choice.conv_block_pays(x, w, pool, needs_grad) != pairs


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("stride", [1, (1, 1), 2, (1, 2)])
def test_choice_is_told_of_strides_and_gradients(stride, grad, monkeypatch):
    told = []
    monkeypatch.setattr(choice, "conv_block_pays", lambda *given: told.append(given) or True)
    x, w = torch.randn(2, 4, 9, 9, requires_grad=grad), torch.randn(8, 4, 3, 3, requires_grad=True)
    choice.conv_block(x, w, stride=stride)
    is_one = stride in (1, (1, 1))
    ((*_, needs_grad, images, dense, device_type, strided_grad),) = told
    expected = (True, None, is_one, "cpu", grad and not is_one)
    assert (needs_grad, images, dense, device_type, strided_grad) == expected


def test_choice_without_vectors(monkeypatch):
    monkeypatch.setattr(choice, "HAS_VECTORS", False)
    x, w = torch.empty(8, 16, 28, 28), torch.empty(16, 16, 3, 3)
    assert not choice.conv_block_pays(x, w, 2, needs_grad=True)
    assert choice.conv_block_pays(x, w, 2, needs_grad=True, device_type="cuda")
