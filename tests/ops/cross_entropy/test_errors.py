"""What cross_entropy says to bad arguments."""

import pytest
import torch
import torch.nn.functional as F

from fastcls.functional import cross_entropy

X, Y, P = torch.zeros(4, 5), torch.arange(4), torch.full((4, 5), 0.2)


def error(exception, message, *args, **kwargs):
    return pytest.param(exception, message, args, kwargs, id=message)


@pytest.mark.parametrize(
    "exception, message, args, kwargs",
    [
        error(TypeError, "input must be a Tensor, got list", [[1.0]], Y),
        error(TypeError, "target must be a Tensor, got list", X, [0, 1, 2, 3]),
        error(TypeError, "weight must be a Tensor, got list", X, Y, [1.0] * 5),
        error(
            ValueError,
            'reduction must be "none", "mean" or "sum", got \'avg\'',
            X,
            Y,
            reduction="avg",
        ),
        error(
            ValueError, 'reduction must be "none", "mean" or "sum", got None', X, Y, reduction=None
        ),
        error(
            ValueError, 'reduction must be "none", "mean" or "sum", got [1]', X, Y, reduction=[1]
        ),
        error(
            RuntimeError,
            "label_smoothing must be between 0.0 and 1.0, got 1.5",
            X,
            Y,
            label_smoothing=1.5,
        ),
        error(TypeError, "label_smoothing must be a float, got None", X, Y, label_smoothing=None),
        error(TypeError, "ignore_index must be an int, got 1.5", X, Y, ignore_index=1.5),
        error(TypeError, "ignore_index must be an int, got None", X, P, ignore_index=None),
        error(
            RuntimeError,
            "input must be float32, float64, bfloat16 or float16, got Long",
            X.long(),
            Y,
        ),
        pytest.param(
            RuntimeError,
            "input must be float32, float64, bfloat16 or float16, got Long",
            (X.long(), P),
            {},
            id="integers with probabilities",
        ),
        error(
            RuntimeError,
            "input must be float32, float64, bfloat16 or float16, got ComplexFloat",
            X.to(torch.complex64),
            Y,
        ),
        error(
            RuntimeError,
            "input must have shape (C), (N, C) or (N, C, d1, ...), got ()",
            X[0, 0],
            Y[0],
        ),
        error(ValueError, "target must have batch size 4 like input, got (3,)", X, Y[:3]),
        error(ValueError, "target must have batch size 4 like input, got ()", X, Y[0]),
        error(
            ValueError,
            "target must have batch size 1, shape () or (1,), with a 1D input, got (2,)",
            X[0],
            Y[:2],
        ),
        error(
            RuntimeError,
            "target must have shape (4,) (class indices) or (4, 5) (class "
            "probabilities), got (4, 1)",
            X,
            Y[:, None],
        ),
        error(
            RuntimeError,
            "target must have shape (4, 3) (class indices) or (4, 5, 3) (class "
            "probabilities), got (4, 2)",
            torch.zeros(4, 5, 3),
            torch.zeros(4, 2).long(),
        ),
        error(
            RuntimeError,
            "target must have shape (4,) (class indices) or (4, 5) (class "
            "probabilities), got (4, 4)",
            X,
            torch.rand(4, 4),
        ),
        error(
            RuntimeError,
            "target must have an integer dtype (class indices of shape (4,)), got Bool",
            X,
            Y.bool(),
        ),
        error(
            RuntimeError,
            "target must have an integer dtype (class indices of shape (4,)), got Float",
            X,
            Y.float(),
        ),
        error(
            RuntimeError,
            "target must have a floating point dtype (class probabilities, as it "
            "has input's shape (4, 5)), got Long",
            X,
            P.long(),
        ),
        error(
            RuntimeError,
            "ignore_index must be negative (unused) with class probabilities, got 2",
            X,
            P,
            ignore_index=2,
        ),
        error(
            RuntimeError,
            "weight must have shape (5,), one value per class, got (4,)",
            X,
            Y,
            torch.ones(4),
        ),
        error(
            RuntimeError,
            "weight must have shape (5,), one value per class, got (1, 5)",
            X,
            P,
            torch.ones(1, 5),
        ),
        error(
            RuntimeError,
            "weight must be Float like input, got Double",
            X,
            Y,
            torch.ones(5).double(),
        ),
        error(
            RuntimeError,
            "weight must be Half like input or Float, got BFloat16",
            X.half(),
            Y,
            torch.ones(5).bfloat16(),
        ),
        error(
            IndexError,
            "target must be in [0, 5) or ignore_index, got 5 in row 2",
            X,
            torch.tensor([0, 1, 5, 7]),
        ),
        error(
            IndexError,
            "target must be in [0, 5) or ignore_index, got -1 in row 1",
            X,
            torch.tensor([0, -1, 2, 3]),
            label_smoothing=0.1,
        ),
        error(
            IndexError,
            "target must be in [0, 5) or ignore_index, got 255 in row 0",
            X,
            torch.tensor([255, 0, 0, 0], dtype=torch.uint8),
            torch.ones(5),
        ),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_errors(exception, message, args, kwargs, grad):
    input, *others = args
    if grad and isinstance(input, torch.Tensor) and input.is_floating_point():
        input = input.detach().requires_grad_()
    with pytest.raises(exception) as raised:
        cross_entropy(input, *others, **kwargs)
    assert str(raised.value) == f"cross_entropy: {message}"
    native = F.cross_entropy
    with pytest.raises(exception):  # PyTorch's own exception for the same call
        native(input, *others, **kwargs)


@pytest.mark.parametrize("name", ["target", "weight"])
def test_device_mix(name):
    tensors = {"input": X, "target": Y, "weight": torch.ones(5)}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of input"):
        cross_entropy(**tensors)
