"""The reference networks: shapes, logits, and one state_dict for fused and native layers."""

import pytest
import torch
from recipe_helpers import SmallVgg

from fastcls.errors import UserError
from fastcls.models import (
    CifarCnn,
    DigitsCnn,
    MnistCnn,
    MnistDeep,
    MnistMlp,
    MnistSpeed,
    SoftmaxRegression,
    TransferVgg,
)

MODELS = [
    (DigitsCnn, (1, 8, 8)),
    (MnistCnn, (1, 28, 28)),
    (MnistDeep, (1, 28, 28)),
    (MnistSpeed, (1, 28, 28)),
    (CifarCnn, (3, 32, 32)),
]
PARAMETERS = {
    DigitsCnn: 53_002,
    MnistCnn: 1_199_882,
    MnistDeep: 987_402,
    MnistSpeed: 39_090,
    CifarCnn: 230_594,
}


@pytest.mark.parametrize(("model", "shape"), MODELS)
@pytest.mark.parametrize("layers", ["fused", "native"])
def test_returns_logits(model, shape, layers):
    logits = model(layers).eval()(torch.rand(4, *shape))
    assert logits.shape == (4, 10)
    # Log-softmax would make every row's exponentials add up to one.
    assert not torch.allclose(logits.exp().sum(1), torch.ones(4), atol=0.01)


@pytest.mark.parametrize(("model", "shape"), MODELS)
def test_number_of_parameters(model, shape):
    assert sum(p.numel() for p in model("fused").parameters()) == PARAMETERS[model]


@pytest.mark.parametrize(("model", "shape"), MODELS)
@pytest.mark.parametrize(("source", "target"), [("fused", "native"), ("native", "fused")])
def test_state_dict_goes_both_ways(model, shape, source, target):
    source, target = model(source).eval(), model(target).eval()
    images = torch.rand(4, *shape)
    assert not torch.allclose(source(images), target(images), atol=1e-4)
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(images), source(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "shape"), MODELS)
def test_one_seed_gives_both_the_same_start(model, shape):
    states = []
    for layers in ("fused", "native"):
        torch.manual_seed(3)
        states.append(model(layers).state_dict())
    assert list(states[0]) == list(states[1])
    for fused, native in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(fused, native)


@pytest.mark.parametrize(("model", "parameters"), [(MnistMlp, 218_058), (SoftmaxRegression, 7_850)])
def test_models_of_linear_layers(model, parameters):
    model = model()
    assert model(torch.rand(4, 1, 28, 28)).shape == (4, 10)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("layers", ["fused", "native"])
def test_cifar_cnn_starts_as_he_et_al_or_as_its_layers(layers):
    model = CifarCnn(layers)
    for layer in (model.conv2, model.conv3, model.fc1):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
        assert not layer.bias.any()
    bound = model.fc1.in_features**-0.5
    assert 0.9 * bound < CifarCnn(layers, init="pytorch").fc1.bias.abs().max() <= bound
    with pytest.raises(UserError, match="init must be one of he, pytorch; got 'zeros'"):
        CifarCnn(layers, init="zeros")


def test_softmax_regression_starts_near_nothing():
    model = SoftmaxRegression()
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not model.fc.bias.any()


@pytest.fixture
def small_vgg(monkeypatch):
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(models, "vgg16", SmallVgg)


def test_transfer_trains_the_new_layers_only(small_vgg):
    model = TransferVgg(7)
    model(torch.rand(2, 3, 16, 16)).square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["head.0.weight", "head.0.bias", "head.3.weight", "head.3.bias"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if n not in trained)


def test_transfer_fused_is_native(small_vgg):
    torch.manual_seed(0)
    fused = TransferVgg(7, layers="fused").eval()
    native = TransferVgg(7, layers="native").eval()
    native.load_state_dict(fused.state_dict())
    assert "FusedConvBlock" in str(fused) and "FusedConvBlock" not in str(native)
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(fused(images), native(images), rtol=1e-4, atol=1e-6)


def test_transfer_takes_weights_from_a_file(small_vgg, tmp_path):
    vgg = SmallVgg()
    torch.save(vgg.state_dict(), tmp_path / "vgg.pt")
    model = TransferVgg(7, str(tmp_path / "vgg.pt"))
    assert torch.equal(model.features[0].weight, vgg.features[0].weight)
    assert torch.equal(model.frozen[0].weight, vgg.classifier[0].weight)


@pytest.mark.parametrize("content", [None, b"no tensors", {"another": torch.zeros(1)}])
def test_unfit_weights_are_named(content, small_vgg, tmp_path):
    file = tmp_path / "vgg.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        torch.save(content, file)
    with pytest.raises(
        UserError, match=r"the weights '.*vgg\.pt' of VGG-16 cannot be had"
    ) as error:
        TransferVgg(7, str(file))
    assert "\n" not in str(error.value)
