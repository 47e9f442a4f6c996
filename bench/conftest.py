"""Options and fixtures of the benchmarks.

`pytest bench/ --benchmark` measures; without the flag the same files are quick checks.
"""

import datetime
import gc

import pytest
import report
import roofline
import torch
from measure import alternate, on_cuda

import fastcls

PEERS = ["eager", "eager-cl", "compile", "compile-cl"]
# On CUDA channels-last alone: eager, eager in CUDA graphs, where launches cost nothing, compiled.
CUDA_PEERS = ["eager-cl", "eager-graph-cl", "compile-cl", "compile-max-cl"]
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
    group.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    group.addoption("--peers", type=_names, help=f"of {','.join(peers)}")
    group.addoption("--seconds", type=float, default=4.0, help="time per row (default: 4)")
    group.addoption("--json", metavar="FILE", help="keep the rows in FILE; auto: in bench/results")


def pytest_configure(config):
    known = CUDA_PEERS if config.getoption("device") == "cuda" else PEERS
    config.option.peers = config.getoption("peers") or known
    if unknown := set(config.option.peers) - set(known):
        raise pytest.UsageError(f"--peers: {', '.join(unknown)} not among {', '.join(known)}")
    if config.getoption("device") == "cuda" and torch.cuda.is_available():
        torch.set_default_device("cuda")
    config.option.benchmark_quiet = True  # the summary below shows all sides, not ours alone
    config.rows = []


def pytest_collection_modifyitems(config, items):
    if config.getoption("device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="--device cuda, but torch finds no GPU"))


def pytest_generate_tests(metafunc):
    """``threads`` as asked for, and a module's ``CASES`` at each of the batch sizes.

    A case with a batch size of its own (``batch`` other than its class's default) keeps it.
    """
    measuring = metafunc.config.getoption("benchmark")
    if "threads" in metafunc.fixturenames:
        counts = {torch.get_num_threads()}
        if measuring and metafunc.config.getoption("device") == "cpu":
            counts |= {1}
        counts = sorted(metafunc.config.getoption("threads") or counts)
        metafunc.parametrize("threads", counts, ids=lambda n: f"{n}t", indirect=True)
    if "case" in metafunc.fixturenames:
        batches = metafunc.config.getoption("batch") if measuring else [QUICK_BATCH]
        pairs = [
            (case, batch)
            for case in _chosen(metafunc.module.CASES, metafunc.config.getoption("only"))
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
def peers(request):
    return request.config.getoption("peers")


@pytest.fixture
def measure(request, threads):
    """``measure(row, sides)`` times the sides and keeps the row; None without --benchmark.

    The row says what was run: op, case, mode, dtype, batch, and bytes and flops where they are
    known. Times and the state of the machine are added to it.
    """
    config = request.config
    if not config.getoption("benchmark"):
        yield None
        return

    def measured(row, sides):
        benchmark = request.getfixturevalue("benchmark")
        times = alternate(benchmark, sides, config.getoption("seconds"), threads)
        row |= {"threads": threads, "seconds": times} | _circumstances(row, threads)
        config.rows.append(row)
        if path := config.getoption("json"):
            report.keep(row, report.machine_file() if path == "auto" else path)

    # Inductor writes the thread count into its code, and looks compiled code up by its config.
    with torch._inductor.config.patch({"cpp.threads": threads}):
        yield measured
    torch._dynamo.reset()
    gc.collect()


def _circumstances(row, threads):
    info = fastcls.build_info()
    isa, torch_isa = info["cpu_isa"], torch.backends.cpu.get_cpu_capability()
    if on_cuda():
        isa, torch_isa = "CUDA", f"CUDA {torch.version.cuda}, driver {roofline.driver()}"
    return {
        "peak_flops": roofline.peak_flops(getattr(torch, row["dtype"]), threads),
        "copy_bytes": roofline.copy_bandwidth(threads),
        "cpu": roofline.device_name(),
        "cores": roofline.cores(),
        "isa": isa,
        "torch_isa": torch_isa,
        "torch": torch.__version__,
        "fastcls": info["fastcls"],
        "date": datetime.date.today().isoformat(),
    }


def pytest_terminal_summary(terminalreporter, config):
    if config.rows:
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(report.text(config.rows))
