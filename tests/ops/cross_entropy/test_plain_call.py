"""The call of cross_entropy that goes past the dispatcher, on the CPU."""

import itertools

import pytest
import torch
from cross_entropy_problems import IGNORED, make_case

from fastcls.functional import cross_entropy
from fastcls.ops import cross_entropy as op

plain_call = op._plain_cross_entropy
needs_plain_call = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="this torch has no DLPack exchange table",
)


@needs_plain_call
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (20, 10), (300, 10), (40, 100), (3, 5003)])
def test_plain_call_gives_what_the_op_gives(shape, dtype, reduction):
    input, target = make_case(shape, "ignore", dtype)
    code = op._REDUCTIONS[reduction]
    for smoothing, active in itertools.product((0.0, 0.1), (False, True)):
        settings = (IGNORED, code, smoothing)
        with torch.autocast("cpu", torch.bfloat16, enabled=active):
            loss, grad = plain_call(input.detach().requires_grad_(), target, *settings)
            alone, nothing = plain_call(input, target, *settings)
        wide = active and dtype == torch.bfloat16
        expected = torch.ops.fastcls.cross_entropy_forward(
            input, target, None, *settings, wide, op._SAVE_GRAD, False
        )
        assert nothing is None and alone.equal(loss)
        assert loss.dtype == expected[0].dtype and loss.equal(expected[0])
        assert grad.dtype == dtype and grad.equal(expected[1])


NOT_PLAIN = {
    "float64": lambda x, y: (x.double(), y),
    "float16": lambda x, y: (x.half(), y),
    "int32 classes": lambda x, y: (x, y.int()),
    "probabilities": lambda x, y: (x, x.softmax(1)),
    "strided logits": lambda x, y: (x.t().contiguous().t(), y),
    "strided classes": lambda x, y: (x, y.repeat_interleave(2)[::2]),
    "broadcast logits": lambda x, y: (x[:1].expand(9, 10), y),
    "negated view": lambda x, y: (torch._neg_view(x), y),
    "maps": lambda x, y: (x[:, :, None], y[:, None]),
    "no batch": lambda x, y: (x[0], y[0]),
    "no rows": lambda x, y: (x[:0], y[:0]),
    "other batch": lambda x, y: (x, y[:4]),
    "out of range": lambda x, y: (x, y + 5),
    "parameter": lambda x, y: (torch.nn.Parameter(x), y),
    "meta": lambda x, y: (x.to("meta"), y.to("meta")),
    "numpy": lambda x, y: (x.numpy(), y),
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_plain_call_leaves_the_rest_to_the_op(what):
    input, target = make_case((9, 10), "index")
    target[0] = 9
    assert plain_call(*NOT_PLAIN[what](input, target), IGNORED, 1, 0.0) is None


@pytest.mark.parametrize(
    "settings", [(2**70, 1, 0.0), (IGNORED, 0, 0.0), (IGNORED, 1, 1.5), (0, 1, 0)]
)
def test_plain_call_leaves_odd_settings_to_the_op(settings):
    assert plain_call(*make_case((9, 10), "index"), *settings) is None


@pytest.mark.parametrize(
    "watcher", ["mode", "function_mode", "profiler", "forward_ad", "trace", "functorch"]
)
def test_plain_call_hides_nothing(watcher):
    input, target = make_case((9, 10), "index")
    calls = []

    def call(x):
        calls.append(plain_call(x, target, IGNORED, 1, 0.0))
        return x.sum()

    if watcher == "mode":
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            call(input)
    elif watcher == "function_mode":
        with torch.overrides.BaseTorchFunctionMode():
            call(input)
    elif watcher == "profiler":
        with torch.profiler.profile() as profile:
            call(input)
            cross_entropy(input, target)
        assert "fastcls::cross_entropy_forward" in [event.key for event in profile.key_averages()]
    elif watcher == "forward_ad":
        with torch.autograd.forward_ad.dual_level():
            call(input)
    elif watcher == "trace":
        torch.jit.trace(call, (input,), check_trace=False)
    else:
        torch.func.grad(call)(input)
    assert calls and all(result is None for result in calls)


@needs_plain_call
def test_is_one():
    one = torch.tensor(1.0)
    assert op._is_one(one) and op._is_one(one.clone())
    others = [
        torch.tensor(2.0),
        one.double(),
        one.bfloat16(),
        one[None],
        torch._neg_view(one),
        None,
    ]
    assert not any(op._is_one(other) for other in others)
