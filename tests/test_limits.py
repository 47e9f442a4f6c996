"""The far ends: sizes, memory, threads, processes and interrupts. Small cases are in ops/."""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_error_within_twice_native, assert_same
from recipe_helpers import run_child
from torch.utils.data import DataLoader, Dataset

from fastcls import reference
from fastcls.functional import conv_block, conv_block_path, cross_entropy

large = pytest.mark.skipif(
    not os.environ.get("FASTCLS_LARGE"), reason="minutes and gigabytes: FASTCLS_LARGE=1 runs it"
)


def problem(C=4, K=8, size=10, images=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(images, C, size, size, generator=g).requires_grad_()
    w = (torch.randn(K, C, 3, 3, generator=g) / C).requires_grad_()
    return x, w


def step(x, w):
    """Both ops, forward and backward: loss and gradients."""
    logits = conv_block(x, w, padding=1).amax((2, 3))
    loss = cross_entropy(logits, torch.arange(len(x)) % logits.shape[1])
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


def assert_same_step(x, w, expected):
    for ours, first in zip(step(x, w), expected, strict=True):
        assert_same(ours, first, "step")


# --------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("C, K", [(65536, 1), (1, 65536), (65536, 3)])
def test_65536_channels(C, K):
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-2, 3, (2, C, 2, 2), generator=g).float().requires_grad_()
    w = torch.randint(-1, 2, (K, C, 1, 1), generator=g).float().requires_grad_()
    out, native = conv_block(x, w), reference.conv_block(x, w)
    assert_same(out, native, "out")  # integers: every sum is exact
    for ours, exact in zip(
        torch.autograd.grad(out.sum(), (x, w)),
        torch.autograd.grad(native.sum(), (x, w)),
        strict=True,
    ):
        assert_same(ours, exact, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_million_classes(dtype):
    g = torch.Generator().manual_seed(2)
    x = (3 * torch.randn(3, 10**6, generator=g)).to(dtype).requires_grad_()
    target = torch.tensor([0, 123_456, 999_999])
    loss = cross_entropy(x, target, label_smoothing=0.1, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    in64 = x.detach().double().requires_grad_()
    exact = reference.cross_entropy(in64, target, label_smoothing=0.1, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), in64)
    single = x.detach().float().requires_grad_()
    native = reference.cross_entropy(single, target, label_smoothing=0.1, reduction="none")
    (native_grad,) = torch.autograd.grad(native.sum(), single)
    assert_error_within_twice_native(
        loss.detach(), [native.detach().to(dtype)], exact.detach(), "loss"
    )
    assert_error_within_twice_native(grad, [native_grad.to(dtype)], exact_grad, "gradient")
    # Native's sum of a million terms is itself some 40 roundings off.
    torch.testing.assert_close(loss.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


GREATEST = 2**31 - 1  # of every size


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 2**62},
        {"padding": GREATEST},
        {"padding": GREATEST, "stride": GREATEST},
        {"padding": GREATEST, "stride": GREATEST, "pool_size": GREATEST, "pool_padding": 2**30 - 1},
        {"stride": 2**62},
        {"dilation": GREATEST},
        {"dilation": 2**62},
        {"pool_size": 2**62},
        {"pool_size": 3, "pool_stride": 2**62, "ceil_mode": True},
        {"pool_size": GREATEST, "pool_padding": 2**30 - 1},
        {"pool_size": 2**62, "pool_padding": 2**61, "ceil_mode": True},
        {"groups": 2**62},
    ],
    ids=str,
)
def test_absurd_sizes_are_an_error(arguments):
    x, w = torch.ones(1, 2, 6, 6), torch.ones(3, 2, 3, 3)
    with pytest.raises(RuntimeError):
        conv_block(x, w, **arguments)


def test_an_absurd_kernel_is_an_error():
    w = torch.ones(3, 2, 1, 1).expand(
        -1, -1, 2**34 + 1, -1
    )  # times the dilation: more than 64 bits
    with pytest.raises(RuntimeError, match="a kernel of at most 2147483647 rows"):
        conv_block(torch.ones(1, 2, 6, 6), w, dilation=2**30)


@pytest.mark.parametrize(
    "large, small",
    [
        ({"pool_stride": GREATEST, "ceil_mode": True}, {"pool_stride": 7, "ceil_mode": True}),
        (
            {"pool_size": (GREATEST - 2, 1), "pool_padding": (2**30 - 2, 0)},
            {"pool_size": (4, 1)},
        ),
    ],
    ids=str,
)
def test_large_arguments_that_mean_the_same_as_small_ones(large, small):
    g = torch.Generator().manual_seed(4)
    x = torch.randint(-2, 3, (2, 2, 6, 6), generator=g).float().requires_grad_()
    w = torch.randint(-1, 2, (3, 2, 3, 3), generator=g).float().requires_grad_()
    out, native = conv_block(x, w, **large), reference.conv_block(x, w, **small)
    assert_same(out, native, "out")
    grads = (torch.autograd.grad(result.sum(), (x, w)) for result in (out, native))
    for ours, exact in zip(*grads, strict=True):
        assert_same(ours, exact, "gradient")


@large
@pytest.mark.parametrize(
    "shape, pool, path",
    [((513, 1, 2048, 2048), 4, "direct"), ((1, 1, 2**16 + 1, 2**15), 16, "general")],
    ids=["images", "one image"],
)
def test_more_than_two_billion_inputs(shape, pool, path):
    row = torch.randint(-2, 3, (1, 1, 1, shape[-1]), generator=torch.Generator().manual_seed(3))
    row = row.to(torch.bfloat16)
    x, w = row.expand(shape), torch.full((1, 1, 1, 1), -2.0, dtype=torch.bfloat16)
    assert x.numel() > 2**31 and conv_block_path(x, w, pool_size=pool) == path
    expected = reference.conv_block(row.expand(1, 1, pool, -1), w, pool_size=pool)
    w.requires_grad_()
    out = conv_block(x, w, pool_size=pool)
    assert (out == expected).all()
    if path == "direct":
        # One window an image has a gradient: no sum is too large to be exact.
        where = expected[0, 0, 0].nonzero()[0].item()
        grad_out = torch.zeros(1, *out.shape[1:], dtype=out.dtype)
        grad_out[..., 5, where] = 1
        (grad,) = torch.autograd.grad(out, w, grad_out.expand(out.shape))
        value = expected[0, 0, 0, where].item() / w.item()
        assert grad.item() == torch.tensor(value * shape[0], dtype=torch.bfloat16).item()


@large
def test_rows_of_windows_that_floats_cannot_count():
    g = torch.Generator().manual_seed(4)
    x = torch.randint(-1, 2, (1, 1, 1, 4_000_000), generator=g).float()
    w = torch.randint(-1, 2, (32, 1, 1, 81), generator=g).float().requires_grad_()
    grads = []
    for block in (conv_block, reference.conv_block):
        out = block(x, w, pool_size=(1, 2))
        far = torch.zeros_like(out)
        far[..., -1000:] = 1
        grads.append(torch.autograd.grad(out, w, far)[0])
    assert_same(*grads, "grad_weight")


@large
def test_more_than_two_billion_rows():
    rows = 2**31 + 5
    logits = torch.tensor([[0.5, -1.0]], dtype=torch.bfloat16)
    target = torch.zeros(1, dtype=torch.int8)
    loss = cross_entropy(logits.expand(rows, 2), target.expand(rows))
    expected = reference.cross_entropy(logits.double(), target)
    assert loss.item() == pytest.approx(expected.item(), rel=torch.finfo(torch.bfloat16).eps)


# -------------------------------------------------------------------------------------- memory


def resident():
    """Bytes of this process that lie in memory."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_thousands_of_small_calls_take_no_memory(one_thread):
    x, w = problem(size=12, images=2)
    for _ in range(500):
        step(x, w)
    before = resident()
    for _ in range(3000):
        step(x, w)
    # The output and its winners are 2.9 KiB: a leak of them would be 8 MiB.
    assert resident() - before < 3 << 20


OUT_OF_MEMORY = """
import resource, torch
from fastcls.functional import conv_block, cross_entropy
torch.set_num_threads(1)
x = torch.zeros(64, 8, 64, 64).requires_grad_()      # 8 MiB
w = torch.zeros(256, 8, 3, 3).requires_grad_()
y = torch.zeros(64, dtype=torch.int64)
small = lambda: conv_block(torch.ones(1, 8, 4, 4), torch.ones(1, 8, 3, 3), padding=1).sum().item()
expected = small()
out = {forward}
{backward}
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + {room}, -1))
for _ in range(3):
    try:
        {fails}
    except (RuntimeError, MemoryError) as error:
        print(type(error).__name__, str(error).splitlines()[0])
    else:
        raise SystemExit("no error")
    assert small() == expected
"""
STEPS = {
    "conv_block forward": {
        "forward": "None",
        "backward": "",
        "fails": "conv_block(x, w, padding=1)",  # 64 MiB
        "room": 20 << 20,
    },
    "conv_block backward": {
        "forward": "conv_block(x, w, padding=1)",
        "backward": "g = torch.zeros_like(out)",
        "fails": "torch.autograd.grad(out, x, g, retain_graph=True)",
        "room": 4 << 20,
    },
    "conv_block float64 backward": {
        "forward": "conv_block(x.double(), w.double(), padding=1, pool_size=None)",
        "backward": "g = torch.zeros_like(out)",
        "fails": "torch.autograd.grad(out, x, g, retain_graph=True)",
        "room": 8 << 20,
    },
    "cross_entropy": {
        "forward": "x.flatten(1)",
        "backward": "",
        "fails": "cross_entropy(out, y)",  # 8 MiB for the gradient
        "room": 4 << 20,
    },
}


@pytest.mark.parametrize("name", STEPS)
def test_out_of_memory_is_an_error_and_nothing_more(name):
    child = run_child("-c", OUT_OF_MEMORY.format(**STEPS[name]), MALLOC_ARENA_MAX="1")
    assert child.returncode == 0, child.stdout + child.stderr[-2000:]
    assert len(child.stdout.splitlines()) == 3
    assert all("alloc" in line or "memory" in line for line in child.stdout.splitlines())


# -------------------------------------------------------------- threads, processes, interrupts


def test_many_python_threads_at_once(one_thread):
    x, w = problem()
    expected = step(x, w)
    barrier = threading.Barrier(8)

    def work(_):
        barrier.wait()
        for _ in range(25):
            assert_same_step(x, w, expected)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_changing_the_number_of_threads_between_calls():
    x, w = problem(images=9)
    expected = step(x, w)
    before = torch.get_num_threads()
    try:
        for count in (3, 1, 7, 2, 16, 1):
            torch.set_num_threads(count)
            assert_same_step(x, w, expected)
    finally:
        torch.set_num_threads(before)


class Steps(Dataset):
    """Loss and gradients, computed in a worker process."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.cat([t.flatten() for t in step(*problem(images=9))])


def test_forked_workers_after_use():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = Steps()[0]  # threads are there when the workers are forked
        loader = DataLoader(Steps(), num_workers=2, multiprocessing_context="fork", timeout=60)
        for (result,) in loader:
            assert_same(result, expected, "in a worker")
        assert_same(Steps()[0], expected, "afterwards")
    finally:
        torch.set_num_threads(before)


def test_interrupted_calls_leave_the_next_ones_right():
    x, w = problem(images=9)
    expected = step(x, w)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupts = 0
    try:
        for i in range(30):
            signal.setitimer(signal.ITIMER_REAL, 0.0003 * (i + 1))
            try:
                while True:
                    step(x, w)
            except KeyboardInterrupt:
                interrupts += 1
            assert_same_step(x, w, expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupts == 30
