"""The modules against torch.nn's: parameters, state, conversion, and the same numbers."""

import copy
import io
import pickle

import pytest
import torch
from cases import CORNERS, REFERENCE
from helpers import assert_same
from torch import nn

from fastcls import FusedConvBlock, FusedCrossEntropyLoss
from fastcls.functional import conv_block
from fastcls.reference import NativeConvBlock

BY_NAME = {c.name: c for c in CORNERS + REFERENCE}
every_corner = pytest.mark.parametrize("case", CORNERS, ids=lambda c: c.name)


def input_for(case, device="cpu", seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.in_channels, case.height, case.width)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(device, **kwargs)


def small_integers_(module, seed=0):
    """Parameters with which every sum is exact."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=g))
    return module


def outputs_and_gradients(module, x):
    x = x.detach().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out.sum(), [x, *module.parameters()])
    return [out.detach(), *grads]


def assert_same_numbers(ours, native, x):
    """On CUDA native layers work in float64, for which no library transforms a convolution."""
    exact = torch.float64 if x.is_cuda else x.dtype
    expected = outputs_and_gradients(copy.deepcopy(native).to(exact), x.to(exact))
    for a, b in zip(outputs_and_gradients(ours, x), expected, strict=True):
        assert_same(a, b.to(a.dtype), "output or gradient")


@every_corner
def test_same_initial_values_under_the_same_seed(case):
    modules = []
    for cls in (FusedConvBlock, NativeConvBlock, nn.Conv2d):
        torch.manual_seed(5)
        arguments = case.block_arguments
        if cls is nn.Conv2d:
            names = ["activation", "pool_size", "pool_stride", "pool_padding", "ceil_mode"]
            arguments = {n: v for n, v in arguments.items() if n not in names}
        modules.append((cls(**arguments), torch.rand(1)))
    for module, following in modules[1:]:
        assert following == modules[0][1], "another number of random values was drawn"
        state = module.state_dict()
        assert list(state) == list(modules[0][0].state_dict())
        for name, value in modules[0][0].state_dict().items():
            assert_same(state[name], value, name)


@every_corner
def test_same_numbers_as_native_layers(case, device):
    fused = small_integers_(FusedConvBlock(**case.block_arguments, device=device))
    native = NativeConvBlock(**case.block_arguments, device=device)
    native.load_state_dict(fused.state_dict())
    x = (input_for(case) * 2).round().to(device, torch.float32)
    assert_same_numbers(fused, native, x)
    assert_same_numbers(fused, fused.to_native(), x)


@pytest.mark.parametrize("padding", [2, (1, 2), "same", "valid"])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_modes(padding, padding_mode, device):
    arguments = {"padding": padding, "padding_mode": padding_mode, "device": device}
    fused = small_integers_(FusedConvBlock(3, 5, (3, 4), **arguments))
    native = NativeConvBlock(3, 5, (3, 4), **arguments)
    native.load_state_dict(fused.state_dict())
    x = torch.randint(-2, 3, (2, 3, 9, 10), generator=torch.Generator().manual_seed(0))
    layers = fused.to_native()
    for other in (native, layers, FusedConvBlock.from_native(layers[0], layers[-1])):
        assert_same_numbers(fused, other, x.float().to(device))


@every_corner
def test_to_native_and_from_native_share_the_parameters(case):
    fused = FusedConvBlock(**case.block_arguments)
    layers = fused.to_native()
    assert [type(m) for m in layers] == [
        nn.Conv2d,
        *([nn.ReLU] if case.activation else []),
        *([nn.MaxPool2d] if case.pool_size else []),
    ]
    pool = layers[-1] if case.pool_size else None
    back = FusedConvBlock.from_native(layers[0], pool, activation=case.activation)
    for module in (layers[0], back):
        assert module.weight is fused.weight
        assert module.bias is fused.bias
    x = input_for(case).float()
    assert_same(back(x), fused(x), "there and back")


def test_conversion_keeps_training_mode_and_frozen_parameters():
    conv = nn.Conv2d(3, 4, 3, dtype=torch.float64).eval().requires_grad_(False)
    fused = FusedConvBlock.from_native(conv, nn.MaxPool2d(2))
    assert not fused.training and not fused.weight.requires_grad
    assert fused.weight.dtype == torch.float64
    assert not fused.to_native().training
    assert not fused.to_native()[0].training


def test_conversion_draws_no_random_numbers():
    conv = nn.Conv2d(3, 4, 3)
    before = torch.get_rng_state()
    FusedConvBlock.from_native(conv).to_native()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "conv, pool, error, message",
    [
        (nn.Linear(3, 4), None, TypeError, "conv must be nn.Conv2d, got Linear"),
        (nn.Conv1d(3, 4, 3), None, TypeError, "conv must be nn.Conv2d, got Conv1d"),
        (nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), TypeError, "pool must be .*, got AvgPool2d"),
        (nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, dilation=2), ValueError, "pool must have dilation 1"),
        (nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, return_indices=True), ValueError, "return_indices"),
    ],
)
def test_from_native_refuses_what_it_cannot_do(conv, pool, error, message):
    with pytest.raises(error, match=f"from_native: .*{message}"):
        FusedConvBlock.from_native(conv, pool)


@every_corner
def test_state_dict_goes_both_ways(case):
    fused, native = FusedConvBlock(**case.block_arguments), NativeConvBlock(**case.block_arguments)
    conv = copy.deepcopy(fused.to_native()[0])
    for source, target in ((fused, native), (native, fused), (fused, conv), (conv, fused)):
        with torch.no_grad():
            for p in source.parameters():
                p.add_(0.5)
        target.load_state_dict(source.state_dict(), strict=True)
        for name, value in source.state_dict().items():
            assert_same(target.state_dict()[name], value, name)


def deepcopied(module):
    return copy.deepcopy(module)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [deepcopied, pickled, saved])
@every_corner
def test_copies_give_the_same_numbers_from_their_own_parameters(case, duplicate):
    fused = FusedConvBlock(**case.block_arguments).eval()
    twin = duplicate(fused)
    assert type(twin) is FusedConvBlock and not twin.training
    assert repr(twin) == repr(fused)
    x = input_for(case).float()
    expected = fused(x)
    assert_same(twin(x), expected, "copy")
    with torch.no_grad():
        twin.weight.zero_()
    assert_same(fused(x), expected, "original")


def test_state_dict_loads_with_weights_only():
    fused, other = FusedConvBlock(3, 4, 3), FusedConvBlock(3, 4, 3)
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other.weight, fused.weight, "weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_another_dtype(dtype, device):
    case = BY_NAME["plain"]
    fused = small_integers_(FusedConvBlock(**case.block_arguments, device=device))
    x = (input_for(case) * 2).round().to(device, torch.float32)
    expected = fused(x)
    out = fused.to(dtype)(x.to(dtype))
    assert fused.weight.dtype == fused.bias.dtype == dtype
    assert_same(out, expected.to(dtype), "out")
    assert FusedConvBlock(3, 4, 3, dtype=dtype).weight.dtype == dtype


@pytest.mark.parametrize("name", ["plain", "tails", "cifar1", "cifar2"])
def test_to_channels_last(name, device):
    case = BY_NAME[name]
    fused = small_integers_(FusedConvBlock(**case.block_arguments, device=device))
    x = (input_for(case) * 2).round().to(device, torch.float32)
    expected = outputs_and_gradients(fused, x)
    fused.to(memory_format=torch.channels_last)
    results = outputs_and_gradients(fused, x.to(memory_format=torch.channels_last))
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert results[2].is_contiguous(memory_format=torch.channels_last)  # grad of the weight
    for ours, contiguous in zip(results, expected, strict=True):
        assert_same(ours, contiguous, "channels-last")


def test_meta_device_and_to_empty():
    fused = FusedConvBlock(3, 8, 3, padding=1, device="meta")
    out = fused(torch.empty(5, 3, 10, 12, device="meta"))
    assert out.shape == (5, 8, 5, 6) and out.device.type == "meta"
    fused.to_empty(device="cpu").reset_parameters()
    assert fused(torch.ones(1, 3, 10, 12)).isfinite().all()


def test_functional_call_and_grad(device):
    case = BY_NAME["plain"]
    fused = FusedConvBlock(**case.block_arguments, device=device, dtype=torch.float64)
    native = NativeConvBlock(**case.block_arguments, device=device, dtype=torch.float64)
    x = input_for(case, device)
    parameters = {n: p.detach() for n, p in fused.named_parameters()}

    def loss(parameters, module):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    ours, expected = (torch.func.grad(loss)(parameters, m) for m in (fused, native))
    assert ours.keys() == expected.keys() == {"weight", "bias"}
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10)


def test_training_steps_follow_native(device, monkeypatch):
    models = []
    for block in (FusedConvBlock, NativeConvBlock):
        torch.manual_seed(0)
        models.append(
            nn.Sequential(
                block(1, 8, 3, padding=1),
                block(8, 16, 3, bias=False),
                nn.Flatten(),
                nn.Linear(144, 10),
            ).to(device)
        )
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(32, 1, 16, 16, generator=g), torch.randint(10, (32,), generator=g)
    losses = []
    # On a GPU both would round to tf32, and differ by that.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for model in models:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(x.to(device)), target.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[1][-1] < 0.8 * losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_compiled_module_is_eager(device):
    torch._dynamo.reset()
    fused = FusedConvBlock(3, 8, 3, padding=1, padding_mode="reflect", device=device)
    x = torch.randn(2, 3, 8, 8, device=device)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        outputs_and_gradients(compiled, x), outputs_and_gradients(fused, x), strict=True
    ):
        assert_same(ours, eager, "compiled")


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"activation": "gelu"}, ValueError),
        ({"pool_size": 1.5}, TypeError),
        ({"pool_size": (2, 2, 2)}, RuntimeError),
        ({"pool_padding": "same"}, TypeError),
        ({"pool_stride": (1, None)}, TypeError),
        ({"ceil_mode": 1}, TypeError),
    ],
    ids=str,
)
def test_bad_arguments_are_told_at_construction(arguments, error):
    (name,) = arguments
    for block in (FusedConvBlock, NativeConvBlock):
        with pytest.raises(error, match=rf"conv_block: {name} must be .*, got"):
            block(3, 4, 3, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"in_channels": 3, "groups": 2},
        {"out_channels": 3, "groups": 2},
        {"groups": 0},
        {"padding_mode": "mirror"},
        {"padding": "full"},
        {"padding": "same", "stride": 2},
    ],
    ids=str,
)
def test_bad_convolution_arguments_are_told_as_by_conv2d(arguments):
    arguments = {"in_channels": 4, "out_channels": 4, "kernel_size": 3, **arguments}
    with pytest.raises(ValueError) as native:
        nn.Conv2d(**arguments)
    with pytest.raises(ValueError) as ours:
        FusedConvBlock(**arguments)
    assert str(ours.value) == str(native.value)


def test_repr_names_what_is_not_the_default():
    assert repr(FusedConvBlock(1, 8, 3)) == (
        "FusedConvBlock(1, 8, kernel_size=(3, 3), stride=(1, 1), activation='relu', pool_size=2)"
    )
    text = repr(
        FusedConvBlock(
            1, 8, 3, activation=None, pool_size=3, pool_stride=2, pool_padding=1, ceil_mode=True
        )
    )
    for part in (
        "activation=None",
        "pool_size=3",
        "pool_stride=2",
        "pool_padding=1",
        "ceil_mode=True",
    ):
        assert part in text


# ---------------------------------------------------------------------------- FusedCrossEntropyLoss

LOSS_ARGUMENTS = pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"weight": torch.arange(1.0, 11)},
        {"ignore_index": 3},
        {"reduction": "sum"},
        {"reduction": "none", "label_smoothing": 0.1},
        {"weight": torch.arange(1.0, 11), "ignore_index": 0, "label_smoothing": 0.2},
    ],
    ids=lambda arguments: ",".join(arguments) or "defaults",
)


@LOSS_ARGUMENTS
def test_loss_is_nn_cross_entropy(arguments, device):
    g = torch.Generator().manual_seed(0)
    x, target = torch.randn(8, 10, generator=g), torch.arange(8)
    results = []
    for loss in (FusedCrossEntropyLoss(**arguments), nn.CrossEntropyLoss(**arguments)):
        logits = x.to(device).requires_grad_()
        out = loss.to(device)(logits, target.to(device))
        results.append((out.detach(), *torch.autograd.grad(out.sum(), logits)))
    for ours, native in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-5, atol=1e-6)


@LOSS_ARGUMENTS
@pytest.mark.parametrize("duplicate", [deepcopied, pickled, saved])
def test_loss_state_and_copies(duplicate, arguments):
    fused, native = FusedCrossEntropyLoss(**arguments), nn.CrossEntropyLoss(**arguments)
    assert fused.state_dict().keys() == native.state_dict().keys()
    fused.load_state_dict(native.state_dict())
    native.load_state_dict(fused.state_dict())
    twin = duplicate(fused)
    x, target = torch.randn(8, 10), torch.arange(8)
    assert_same(twin(x, target), fused(x, target), "copy")


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_torch_fx_traces_a_block_as_one_call(padding_mode):
    net = nn.Sequential(
        FusedConvBlock(3, 4, 3, padding=1, padding_mode=padding_mode), FusedConvBlock(4, 4, 3)
    )
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(net)))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if t is not nn.functional.pad] == [conv_block] * 2
    assert_same_numbers(traced, net, torch.randn(2, 3, 9, 9))


def test_torch_fx_traces_a_loss_as_one_call():
    loss, logits, target = FusedCrossEntropyLoss(torch.rand(5)), torch.randn(4, 5), torch.arange(4)
    traced = torch.fx.symbolic_trace(loss)
    assert_same(traced(logits, target), loss(logits, target), "loss")
