"""What conv_block says to bad arguments."""

import re

import pytest
import torch
from conv_block_problems import (
    BY_NAME,
    DTYPES,
    backward,
    forward_with_winner,
    not_emulated,
    random_problem,
)
from helpers import assert_same

from fastcls import reference
from fastcls.functional import conv_block

ones = torch.ones
GOOD = {"input": ones(2, 4, 8, 8), "weight": ones(6, 4, 3, 3), "bias": ones(6)}
# name: (what differs from GOOD, message)
BAD = {
    "input-1d": ({"input": ones(8)}, r"input must be 3D .* or 4D .*, got \(8,\)"),
    "input-2d": ({"input": ones(8, 8)}, r"input must be 3D .* or 4D .*, got \(8, 8\)"),
    "input-5d": ({"input": ones(1, 1, 4, 8, 8)}, r"input must be 3D .*, got \(1, 1, 4, 8, 8\)"),
    "input-list": ({"input": [1.0]}, r"input must be a Tensor, got list"),
    "input-channels": ({"input": ones(2, 5, 8, 8)}, r"input must have 4 channels .*, got 5"),
    "unbatched-channels": ({"input": ones(5, 8, 8)}, r"input must have 4 channels .*, got 5"),
    "no-channels": (
        {"input": ones(2, 0, 8, 8), "weight": ones(6, 0, 3, 3)},
        r"input must have .*, got \(2, 0, 8, 8\)",
    ),
    "no-rows": (
        {"input": ones(2, 4, 0, 8), "padding": 2},
        r"input must have .*, got \(2, 4, 0, 8\)",
    ),
    "input-int": ({"input": ones(2, 4, 8, 8).long()}, r"input must be float32.*, got Long"),
    "all-bool": ({n: t.bool() for n, t in GOOD.items()}, r"input must be float32.*, got Bool"),
    "weight-none": ({"weight": None}, r"weight must be a Tensor, got NoneType"),
    "weight-3d": ({"weight": ones(6, 4, 3)}, r"weight must be 4D .*, got \(6, 4, 3\)"),
    "weight-3d-same": (
        {"weight": ones(6, 4, 3), "padding": "same"},
        r"weight must be 4D .*, got \(6, 4, 3\)",
    ),
    "weight-float64": (
        {"weight": GOOD["weight"].double()},
        r"weight must be Float like input, got Double",
    ),
    "weight-half": (
        {"weight": GOOD["weight"].bfloat16()},
        r"weight must be Float like input, got BFloat16",
    ),
    "weight-other-half": (
        {"input": GOOD["input"].bfloat16(), "weight": GOOD["weight"].half()},
        r"weight must be BFloat16 like input or Float, got Half",
    ),
    "no-outputs": (
        {"weight": ones(0, 4, 3, 3), "bias": ones(0)},
        r"out_channels must be a positive multiple of groups \(1\), got 0",
    ),
    "no-kernel": ({"weight": ones(6, 4, 0, 3)}, r"weight must have .*, got \(6, 4, 0, 3\)"),
    "bias-int": ({"bias": 3}, r"bias must be a Tensor, got int"),
    "bias-length": ({"bias": ones(5)}, r"bias must have shape \(6,\), got \(5,\)"),
    "bias-2d": ({"bias": ones(6, 1)}, r"bias must have shape \(6,\), got \(6, 1\)"),
    "bias-0d": ({"bias": torch.tensor(1.0)}, r"bias must have shape \(6,\), got \(\)"),
    "bias-float64": ({"bias": ones(6).double()}, r"bias must be Float like weight, got Double"),
    "groups-channels": ({"groups": 3}, r"input must have 12 channels .*, got 4"),
    "groups-outputs": (
        {"weight": ones(5, 2, 3, 3), "bias": ones(5), "groups": 2},
        r"out_channels must be a positive multiple of groups \(2\), got 5",
    ),
    "groups-0": ({"groups": 0}, r"groups must be at least 1, got 0"),
    "groups-negative": ({"groups": -1}, r"groups must be at least 1, got -1"),
    "groups-float": ({"groups": 1.0}, r"groups must be an int, got 1.0"),
    "padding-name": ({"padding": "full"}, r"padding must be .*, got 'full'"),
    "same-strided": ({"padding": "same", "stride": 2}, r'padding="same" needs stride 1, got 2'),
    "same-input-1d": ({"input": ones(64), "padding": "same"}, r"input must be .*, got \(64,\)"),
    "same-dilation": (
        {"padding": "same", "dilation": 1.5},
        r"dilation must be an int or 2 ints, got 1.5",
    ),
    "kernel-too-large": (
        {"input": ones(2, 4, 2, 8)},
        r"kernel size .*3 x 3.* can't be greater than the padded input \(2 x 8\)",
    ),
    "dilated-too-large": (
        {"dilation": 4},
        r"kernel size .*9 x 9.* can't be greater than the padded input \(8 x 8\)",
    ),
    "pool-too-large": ({"pool_size": 7}, r"pool_size \(7, 7\) can't be .* map \(6 x 6\)"),
    "pool-too-wide": ({"pool_size": (2, 7)}, r"pool_size \(2, 7\) can't be .* map \(6 x 6\)"),
    "pool-padding-half": (
        {"pool_padding": 2},
        r"pool_padding must be at most half of pool_size \(2, 2\), got \(2, 2\)",
    ),
    "pool-padding-odd": (
        {"pool_size": 3, "pool_padding": 2},
        r"pool_padding must be at most half of pool_size \(3, 3\), got \(2, 2\)",
    ),
    "ceil-mode": ({"ceil_mode": 1}, r"ceil_mode must be a bool, got 1"),
}
LEAST = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "pool_size": 1,
    "pool_stride": 1,
    "pool_padding": 0,
}
for name, least in LEAST.items():
    for value, message in {
        least - 1: rf"{name} must be at least {least}, got \({least - 1}, {least - 1}\)",
        (2, -3): rf"{name} must be at least {least}, got \(2, -3\)",
        (1, 1, 1): rf"{name} must be an int or 2 ints, got \(1, 1, 1\)",
        1.5: rf"{name} must be an int or 2 ints, got 1.5",
        (1, 1.5): rf"{name} must be an int or 2 ints, got \(1, 1.5\)",
        "one": rf"{name} must be .*ints, got 'one'",
    }.items():
        BAD[f"{name}={value}"] = ({name: value}, message)


def raised_by(f, arguments):
    try:
        f(**arguments)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_error_is_of_native_type_and_says_what_came(bad, device):
    difference, message = bad
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in {**GOOD, **difference}.items()
    }
    ours = raised_by(conv_block, arguments)
    native = raised_by(reference.conv_block, arguments)
    # NotImplementedError is the RuntimeError with which PyTorch refuses some dtypes.
    assert type(ours) is (RuntimeError if isinstance(native, RuntimeError) else type(native))
    assert re.match(f"conv_block: {message}", str(ours))


def test_unknown_activation_is_a_value_error():
    with pytest.raises(ValueError, match=r"conv_block: activation must be .*, got 'gelu'"):
        conv_block(ones(1, 4, 8, 8), ones(6, 4, 3, 3), activation="gelu")


@not_emulated
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_tensors_on_different_devices_are_an_error(which, grad, device):
    other = "meta" if device.type == "cpu" else "cpu"
    tensors = {
        name: t.detach().to(other if name == which else device).requires_grad_(grad)
        for name, t in GOOD.items()
    }
    with pytest.raises(RuntimeError, match=r"conv_block: \w+ must be on the device of input .*got"):
        conv_block(**tensors)


def test_backward_op_checks_what_it_gets(device):
    case = BY_NAME["plain"]
    x, w, b, grad_out = random_problem(case, DTYPES["float32"], device)
    _, winner = forward_with_winner(x, w, b, case)
    for bad, message in (
        ((grad_out[:, :, 1:], x, w, winner), r"grad_out must have shape \(3, 16, 5, 6\), got"),
        ((grad_out[0], x, w, winner), r"grad_out must have shape"),
        ((grad_out.double(), x, w, winner), r"grad_out must be Float like input, got Double"),
        ((grad_out, x, w, winner[1:]), r"winner must be the one .*, got \(2, 5, 6, 16\) Byte"),
        ((grad_out, x, w, winner.int()), r"winner must be the one .*, got .* Int"),
        ((grad_out, x, w, winner[..., :0]), r"winner must be the one"),
        ((grad_out, x[:, 1:], w, winner), r"input must have 8 channels .*, got 7"),
    ):
        with pytest.raises(RuntimeError, match=f"conv_block_backward: {message}"):
            backward(*bad, case)


def test_integers_of_any_kind_are_arguments(device):
    numpy = pytest.importorskip("numpy")
    x, w, b, _ = random_problem(BY_NAME["plain"], DTYPES["float32"], device)
    expected = conv_block(x, w, b, padding=1, pool_size=2)
    assert_same(conv_block(x, w, b, padding=numpy.int64(1), pool_size=[2, 2]), expected, "out")
    assert_same(conv_block(x, w, b, (1,), [1], pool_size=torch.tensor(2)), expected, "out")
