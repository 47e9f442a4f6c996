"""The reference networks: shapes, logits, and one state_dict for fused and native layers."""

import pytest
import torch

from fastcls.models import CifarCnn, DigitsCnn, MnistCnn

MODELS = [(DigitsCnn, (1, 8, 8)), (MnistCnn, (1, 28, 28)), (CifarCnn, (3, 32, 32))]
PARAMETERS = {DigitsCnn: 53_002, MnistCnn: 1_199_882, CifarCnn: 230_594}


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
