"""Options and fixtures of the benchmarks.

`pytest bench/ --benchmark` measures; without the flag the same files are quick checks.
"""

import gc

import pytest
import report
import roofline
import torch
from measure import Gpu, alternate, arithmetic, on_cuda

PEERS = ["eager", "eager-cl", "compile", "compile-cl"]
# On CUDA channels-last alone: eager and compiled, as they are and in CUDA graphs, where launches
# cost nothing, and compiled by max-autotune. Then libraries for the loss, where they are installed.
CUDA_PEERS = [
    *["eager-cl", "eager-graph-cl", "compile-cl", "compile-graph-cl", "compile-max-graph-cl"],
    *["liger", "quack", "quack-graph"],
]
# Of a row; a module may have others. "tf32" is PyTorch's default for float32 convolutions on CUDA.
DTYPES = {
    "cpu": ["float32", "bfloat16"],
    "cuda": ["bfloat16", "float16", "tf32", "float32"],
}
QUICK_BATCH = 2


def _numbers(text):
    return [int(n) for n in text.split(",")]


def _names(text):
    return text.split(",")


def pytest_addoption(parser):
    group = parser.getgroup("fastcls benchmarks")
    group.addoption("--benchmark", action="store_true", help="measure (default: quick checks)")
    group.addoption("--batch", type=_numbers, default=[512], help="batch sizes: 512,128,20")
    group.addoption(
        "--threads", type=_numbers, help="thread counts: 1,2 (default: one, and all cores)"
    )
    group.addoption("--only", type=_names, help="names of cases: mnist1,mnist2")
    peers = sorted({*PEERS, *CUDA_PEERS})
    group.addoption("--dtypes", type=_names, help="bfloat16,tf32 (default: all)")
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    group.addoption("--peers", type=_names, help=f"of {','.join(peers)}")
    group.addoption(
        "--seconds",
        type=float,
        default=4.0,
        help="time per row (default: 4); 0: every side runs, which fills the caches of compilers",
    )
    group.addoption(
        "--few-compiled",
        action="store_true",
        help="compiled peers of conv_block in training with bfloat16 and tf32 only: minutes less",
    )
    group.addoption("--json", metavar="FILE", help="keep the rows in FILE; auto: in bench/results")
    group.addoption("--missing", action="store_true", help="only rows that FILE does not have")


def pytest_configure(config):
    known = CUDA_PEERS if config.getoption("device") == "cuda" else PEERS
    config.option.peers = config.getoption("peers") or known
    if unknown := set(config.option.peers) - set(known):
        raise pytest.UsageError(f"--peers: {', '.join(unknown)} not among {', '.join(known)}")
    for name in ("batch", "threads"):
        if min(config.getoption(name) or [1]) < 1:
            raise pytest.UsageError(f"--{name}: every number must be at least 1")
    several = getattr(config.option, "numprocesses", None) and config.getoption("seconds")
    if several and config.getoption("benchmark") and config.getoption("device") == "cpu":
        raise pytest.UsageError("-n: on the CPU processes would be in each other's times")
    if config.getoption("device") == "cuda" and torch.cuda.is_available():
        torch.set_default_device("cuda")
    config.option.benchmark_quiet = True  # the summary below shows all sides, not ours alone


def pytest_collection_modifyitems(config, items):
    _check_names(config, {item.module for item in items if item.path.name.startswith("bench_")})
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="--device cuda, but torch finds no GPU"))


def _check_names(config, modules):
    """A name that no module has would leave everything out, as if all were well."""
    device = config.getoption("device")
    cases = {case.name for module in modules for case in _cases(module, device)}
    dtypes = {name for module in modules for name in _dtypes(module, device)}
    for option, known in (("only", cases), ("dtypes", dtypes)):
        if unknown := sorted({*(config.getoption(option) or ())} - known):
            message = f"--{option}: {', '.join(unknown)} not among {', '.join(sorted(known))}"
            raise pytest.UsageError(message)


def _cases(module, device):
    cases = getattr(module, "CASES", [])
    return getattr(module, "CUDA_CASES", cases) if device == "cuda" else cases


def _dtypes(module, device):
    return getattr(module, "DTYPES", DTYPES)[device]


def pytest_generate_tests(metafunc):
    """``threads`` as asked for, and a module's ``CASES`` at each of the batch sizes.

    A case with a batch size of its own (``batch`` other than its class's default) keeps it.
    """
    measuring = metafunc.config.getoption("benchmark")
    if "threads" in metafunc.fixturenames:
        counts = {
            1
        }  # on CUDA; of more the processes that prepare rows would only be in each other's way
        if metafunc.config.getoption("device") == "cpu":
            counts = {torch.get_num_threads(), *(counts if measuring else ())}
        counts = sorted(metafunc.config.getoption("threads") or counts)
        metafunc.parametrize("threads", counts, ids=lambda n: f"{n}t", indirect=True)
    device = metafunc.config.getoption("device")
    if "dtype" in metafunc.fixturenames:
        names = _dtypes(metafunc.module, device)
        chosen = metafunc.config.getoption("dtypes") or names
        metafunc.parametrize("dtype", [n for n in names if n in chosen], indirect=True)
    if "case" in metafunc.fixturenames:
        batches = metafunc.config.getoption("batch") if measuring else [QUICK_BATCH]
        pairs = [
            (case, batch)
            for case in _chosen(_cases(metafunc.module, device), metafunc.config.getoption("only"))
            for batch in (batches if case.batch == type(case).batch else [case.batch])
        ]
        if not measuring:
            pairs = [(case, min(batch, QUICK_BATCH)) for case, batch in pairs]
        ids = [f"{case.name}-n{batch}" for case, batch in pairs]
        metafunc.parametrize("case, batch", pairs, ids=ids)


def _chosen(cases, names):
    return [case for case in cases if not names or case.name in names]


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def dtype(request):
    with arithmetic(request.param):
        yield request.param


@pytest.fixture
def peers(request):
    names = request.config.getoption("peers")
    chosen = getattr(request.module, "FEW_COMPILED", None)
    given = request.node.callspec.params
    few = chosen and request.config.getoption("few_compiled")
    if few and (given["mode"], given["dtype"]) not in chosen:
        names = [name for name in names if not name.startswith("compile")]
    return names


@pytest.fixture
def gpu():
    """The GPU, shared with other processes that prepare; None on a CPU."""
    if not on_cuda():
        yield None
        return
    gpu = Gpu()
    gpu.share()
    yield gpu
    gc.collect()
    torch.cuda.empty_cache()
    gpu.leave()


@pytest.fixture
def measure(request, threads, gpu):
    """``measure(row, make_sides)`` times the sides and keeps the row; None without --benchmark.

    The row says what was run: op, case, mode, dtype, batch, and bytes and flops where they are
    known. Times and the state of the machine are added to it. ``make_sides`` is a function without
    arguments, for where the row is there already nothing is made.
    """
    config = request.config
    if not config.getoption("benchmark"):
        yield None
        return

    def measured(row, make_sides):
        seconds, path = config.getoption("seconds"), config.getoption("json")
        path = report.machine_file() if path == "auto" else path
        if config.getoption("missing") and path and report.has(row | {"threads": threads}, path):
            pytest.skip("measured before")
        sides = make_sides()
        if gpu and seconds:
            alternate(None, sides, 0, threads)  # compiles, while others do
            gpu.take()
        times = alternate(lambda: request.getfixturevalue("benchmark"), sides, seconds, threads)
        if times:
            row |= {"seconds": times} | roofline.circumstances(row["dtype"], threads)
            request.node.user_properties.append(("row", row))
            if path:
                report.keep(row, path)
        if gpu:
            gpu.share()

    # Inductor writes the thread count into its code, and looks compiled code up by its config.
    with torch._inductor.config.patch({"cpp.threads": threads}):
        yield measured
    torch._dynamo.reset()
    gc.collect()


def pytest_runtest_logreport(report):
    if report.when == "call":
        rows.extend(value for name, value in report.user_properties if name == "row")


rows = []  # measured in this process or, with pytest -n, in others


def pytest_terminal_summary(terminalreporter):
    if rows:
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(report.text(rows))
