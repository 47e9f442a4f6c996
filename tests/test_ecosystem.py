"""Fused models in the hands of PyTorch's own tools and of others' libraries."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch
import torch.nn.functional as F
from nets import LeNet, MnistExample, Normed, conv, layers
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fastcls
from fastcls import fuse, fusion_report
from fastcls.fusing import choice
from fastcls.fusing.dynamo import swap_chains

FORWARD, BACKWARD = "fastcls::conv_block_forward", "fastcls::conv_block_backward"


def pair(make):
    """A native model and its fused copy, with parameters of their own."""
    torch.manual_seed(0)
    native = make()
    return native, fuse(copy.deepcopy(native))


def batch(model, n=8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *model.image, generator=g), torch.arange(n) % 4


def gradients(model, x, target=None):
    model.zero_grad()
    out = model(x)
    loss = out.square().mean() if target is None else F.cross_entropy(out, target)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_close(ours, native, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(ours, native, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------- torchvision


def outputs_and_gradients(model, x):
    """The gradients are those of the convolutions."""
    out = model(x)
    wanted = [p for n, p in model.named_parameters() if "classifier" not in n]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize(
    "name, chains, size",
    [
        ("alexnet", 5, 64),
        ("vgg11", 8, 32),
        ("vgg16", 13, 32),
        ("vgg16_bn", 13, 32),
        ("squeezenet1_1", 26, 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchvision(name, chains, size, dtype, monkeypatch):
    """Every chain is swapped, outputs and gradients are native's.

    In float64 every fused op runs and there is next to no rounding. In float32 those run that are
    chosen, and rounding makes a few windows of a random net choose another winner.
    """
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    native = getattr(models, name)(num_classes=10).eval()
    if dtype == torch.float64 and "vgg" in name:
        native.classifier = nn.Flatten()  # 120 million weights that no chain is made of
    native = native.to(dtype)
    fused = fuse(native)
    report = fusion_report(fused)
    assert len(report) == len(report.fused) == chains and not report.notes, str(report)
    assert list(fused.state_dict()) == list(native.state_dict())
    if dtype == torch.float64:
        monkeypatch.setattr(choice, "conv_block_pays", lambda *_: True)
    x = torch.randn(1, 3, size, size, dtype=dtype)
    tolerance = 1e-2 if dtype == torch.float32 else 1e-10
    results = [outputs_and_gradients(model, x) for model in (fused, native)]
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).norm() <= tolerance * expected.norm()


# -------------------------------------------------------------------------------- torch.compile


def swapped_graph(f, *inputs, **options):
    """Names of the functions in the graph that the backend gives to Inductor, and f's result."""
    names = []

    def backend(gm, example_inputs):
        swap_chains(gm)
        calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
        names.extend(n.target if isinstance(n.target, str) else n.target.__name__ for n in calls)
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(f, backend=backend, fullgraph=True, **options)(*inputs)
    return names, result


@pytest.mark.parametrize(
    "make, blocks",
    [(LeNet, 2), (MnistExample, 2), (Normed, 0)],
    ids=lambda v: getattr(v, "__name__", v),
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_backend_swaps_a_training_step(make, blocks, dynamic):
    model = make().eval().train(make is Normed)  # dropout draws other numbers when compiled
    x, target = batch(model, 4)

    def step(x, target):
        out = model(x).flatten(1)
        return F.nll_loss(F.log_softmax(out, 1), target) + F.cross_entropy(out, target)

    names, loss = swapped_graph(step, x, target, dynamic=dynamic)
    assert names.count("conv_block") == blocks
    assert names.count("nll_of_log_softmax") == names.count("cross_entropy") == 1
    assert not {"nll_loss", "log_softmax"} & set(names[names.index("cross_entropy") :])
    assert_close(loss, step(x, target))


def test_backend_folds_batch_norm_in_evaluation():
    native = layers(conv(), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.ReLU()).eval()
    native[1].running_mean.uniform_()
    x = batch(native)[0]
    with torch.no_grad():
        names, out = swapped_graph(native, x)
        assert_close(out, native(x))
    assert "batch_norm" not in names and {"fold_batch_norm", "conv_block"} <= set(names)


@pytest.mark.parametrize("place", ["around", "inside"])
def test_backend_under_autocast(place):
    model = LeNet()
    x, target = batch(model)

    def forward(x):
        return F.nll_loss(F.log_softmax(model(x), 1), target)

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            logits = F.log_softmax(model(x), 1)
        return F.nll_loss(logits, target)

    f = inside if place == "inside" else forward
    with torch.autocast("cpu", torch.bfloat16, enabled=place == "around"):
        names, loss = swapped_graph(f, x)
        expected = f(x)
    assert loss.dtype == expected.dtype
    assert_close(loss, expected, rtol=2e-2, atol=0)
    assert names.count("conv_block") == 2
    assert ("nll_of_log_softmax" in names) == (place == "around")


def test_backend_trains_with_inductor_at_any_batch_size():
    """One graph without breaks for all batch sizes, and no compilation after the first step."""
    native = LeNet()
    compiled = copy.deepcopy(native)
    step = torch.compile(
        lambda x, target: F.cross_entropy(compiled(x), target),
        backend=fastcls.fusing.dynamo.fastcls,
        dynamic=True,
        fullgraph=True,
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (native, compiled)]
    for n in (40, 40, 20, 48):
        x, target = batch(native, n)
        losses = [F.cross_entropy(native(x), target), step(x, target)]
        assert_close(losses[1], losses[0])
        for loss, optimiser in zip(losses, optimisers, strict=True):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.profiler.profile() as profile:
        step(x, target)
    assert {e.key: e.count for e in profile.key_averages()}[FORWARD] == 2
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for ours, expected in zip(compiled.parameters(), native.parameters(), strict=True):
        assert_close(ours, expected)


def test_backend_is_found_without_importing_fastcls(tmp_path):
    """By its entry point, as pip installs it."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    info = tmp_path / "fastcls_entry_points-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fastcls-entry-points\nVersion: 1\n"
    )
    entries = project["entry-points"]["torch_dynamo_backends"]
    lines = ["[torch_dynamo_backends]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))
    program = """
import sys, torch
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
with torch.no_grad():
    assert "fastcls" not in sys.modules
    net = torch.compile(net, backend="fastcls")
    with torch.profiler.profile() as profile:
        net(torch.randn(1, 3, 8, 8))
print(*{event.key for event in profile.key_averages()})
"""
    paths = [str(tmp_path), str(Path(fastcls.__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=tmp_path,  # not the root, whose fastcls/ would hide the installed one
        capture_output=True,
        text=True,
    )
    assert FORWARD in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("make", [LeNet, Normed])
def test_native_compile_of_a_fused_model(make):
    native, fused = pair(make)
    for train in (False, True):  # training moves the statistics of the one that trains more
        torch._dynamo.reset()
        native.train(train), fused.train(train)
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
        for n in (8, 4):
            x, _ = batch(native, n)
            assert_close(compiled(x), native(x))
            ours = list(gradients(compiled, x).values())
            assert_close(ours, list(gradients(fused, x).values()))


# ------------------------------------------------------------------------------------- exports


def exportable():
    net = layers(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 8), nn.ReLU())
    return net.eval()


def test_export_with_a_dynamic_batch():
    native, fused = pair(exportable)
    x, _ = batch(native)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    targets = [n.target for n in program.graph.nodes]
    assert torch.ops.fastcls.conv_block.default in targets
    for n in (8, 3):
        x, _ = batch(native, n)
        assert_close(program.module()(x), native(x))


class LeNetWithLoss(LeNet):
    def __init__(self):
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x, target):
        return self.loss(super().forward(x), target)


def exported_step(strict=False):
    """A native model with its loss, and the program of its fused copy."""
    native, fused = pair(LeNetWithLoss)
    assert len(fusion_report(fused).fused) == 3
    dynamic = ({0: torch.export.Dim("n", min=2)},) * 2
    program = torch.export.export(fused, batch(native), dynamic_shapes=dynamic, strict=strict)
    ops = torch.ops.fastcls
    targets = [n.target for n in program.graph.nodes]
    assert targets.count(ops.conv_block.default) == 2
    assert targets.count(ops.cross_entropy.default) == 1
    return native, program


def loss_gradients(model, n=8, image=LeNet):
    model.zero_grad()
    model(*batch(image, n)).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("steps", ["exported", "saved", "decomposed", "without gradients"])
def test_an_exported_model_trains(steps, strict, tmp_path):
    with torch.set_grad_enabled(steps != "without gradients"):
        native, program = exported_step(strict)
    if steps == "decomposed":
        program = program.run_decompositions()
    if steps == "saved":
        torch.export.save(program, tmp_path / "program.pt2")
        program = torch.export.load(tmp_path / "program.pt2")
    models = native, program.module()
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    for n in (8, 3, 5):
        assert_close(*(loss_gradients(m, n) for m in models))
        for optimiser in optimisers:
            optimiser.step()
    assert_close(*(list(m.parameters()) for m in models))


def test_an_exported_model_under_autocast():
    """As PyTorch's own ops do, those of a program go by the mode they are run in."""
    _, fused = pair(LeNetWithLoss)
    exported = exported_step()[1].module()
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (loss_gradients(m) for m in (exported, fused))
    assert_close(ours, expected, rtol=2e-2, atol=1e-3)
    with pytest.raises(AssertionError):
        assert_close(ours, loss_gradients(fused), rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients_of_an_exported_model():
    native, program = exported_step()
    penalties = []
    for model in (native, program.module()):
        parameters = list(model.parameters())
        grads = torch.autograd.grad(model(*batch(native)), parameters, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        penalties.append(torch.autograd.grad(penalty, parameters))
    assert_close(*penalties)


def test_torch_func_of_an_exported_model():
    native, program = exported_step()
    parameters = {n: p.detach() for n, p in native.named_parameters()}
    x, target = (t.unflatten(0, (4, 2)) for t in batch(native))  # four models' batches of two

    def per_batch(model):
        def loss(parameters, x, target):
            return torch.func.functional_call(model, parameters, (x, target))

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)

    exported = program.module()
    assert_close(per_batch(exported), per_batch(native))


def test_compile_of_an_exported_model():
    """Down to the kernels' ops, without a detour through Python."""
    native, program = exported_step()
    torch._dynamo.reset()
    compiled = torch.compile(program.module(), backend="aot_eager", fullgraph=True)
    assert_close(loss_gradients(compiled), loss_gradients(native))
    with torch.profiler.profile() as profile:
        loss_gradients(compiled)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls[FORWARD] == calls[BACKWARD] == 2 and "fastcls::conv_block" not in calls


def test_export_of_forward_and_backward():
    from torch.export.experimental import _export_forward_backward

    native, program = exported_step()
    joint = _export_forward_backward(program).graph_module
    arguments = [p.detach() for p in native.parameters()] + list(batch(native))
    _, *grads = torch.fx.Interpreter(joint).run(*arguments)
    assert_close(grads, loss_gradients(native))


@pytest.mark.parametrize("grad", [False, True])
def test_aot_inductor(tmp_path, grad):
    """The package holds the kernels' ops, which need no Python."""
    native, fused = pair(lambda: layers(conv(), nn.ReLU(), nn.MaxPool2d(2)).eval())
    x, _ = batch(native)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(fused, (x,))
    path = str(tmp_path / "net.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=path)
    with torch.no_grad():
        loaded = torch._inductor.aoti_load_package(package)
        with torch.profiler.profile() as profile:
            assert_close(loaded(x), native(x))
    calls = {event.key for event in profile.key_averages()}
    assert FORWARD in calls and "fastcls::conv_block" not in calls


def test_onnx_and_onnx_runtime(monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(choice, "conv_block_pays", lambda *_: True)
    native, fused = pair(exportable)
    x, _ = batch(native)
    program = torch.onnx.export(
        fused, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
    )
    names = [node.op_type for node in program.model_proto.graph.node]
    assert [n for n in names if n in ("Conv", "Relu", "MaxPool")] == [
        *("Conv", "Relu", "MaxPool"),
        *("Conv", "Relu"),
    ]
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for n in (8, 3):
        x, _ = batch(native, n)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(out), native(x).detach())


def test_onnx_of_an_exported_model():
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(exported_step()[1], (), dynamo=True, verbose=False)
    nodes = program.model_proto.graph.node
    assert sum(node.op_type == "Conv" for node in nodes) == 2
    assert {node.domain for node in nodes} == {""}


# --------------------------------------------------------------------------- training and loops


def test_distributed_data_parallel(tmp_path):
    """Two ranks over gloo get the gradients of one process with the whole batch."""
    torch.multiprocessing.spawn(ranks.gradients, (2, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    images, labels = ranks.data()
    expected = gradients(LeNet(), images, labels)
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


def loader(model):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(model, 24)), 8)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    models = pair(LeNet)
    for model in models:
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prepared = accelerator.prepare(model, optimizer, loader(model))
        for x, target in prepared[2]:
            prepared[1].zero_grad()
            accelerator.backward(F.cross_entropy(prepared[0](x), target))
            prepared[1].step()
    native, fused = (m.state_dict() for m in models)
    assert_close(fused, native)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = LeNet()
            self.loss = nn.CrossEntropyLoss()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            x, target = batch
            return self.loss(self(x), target)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    native, fused = pair(Module)
    assert len(fusion_report(fused).fused) == 3  # two blocks and the loss
    before = copy.deepcopy(native.state_dict())
    for model in (native, fused):
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, loader(model.net))
    assert_close(fused.state_dict(), native.state_dict())
    assert not torch.equal(before["net.conv1.weight"], native.net.conv1.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grad_scaler(dtype):
    native, fused = pair(LeNet)
    x, target = batch(native)
    results = []
    for model in (fused, native):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = F.cross_entropy(model(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 4096
        # An overflow reaches the scaler: no step, and a smaller scale.
        weight = model.conv1.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(model(x * torch.inf).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2048 and torch.equal(model.conv1.weight, weight)
        results.append(model.state_dict())
    assert_close(*results, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    native, fused = pair(LeNet)
    x, target = batch(native)
    x.requires_grad_()
    expected = gradients(native, x, target)
    F.cross_entropy(checkpoint(fused, x, use_reentrant=use_reentrant), target).backward()
    assert_close({n: p.grad for n, p in fused.named_parameters()}, expected)
    native, fused = pair(lambda: layers(conv(), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4), nn.ReLU()))
    x = batch(native)[0].requires_grad_()
    checkpoint_sequential(fused, 2, x, use_reentrant=use_reentrant).square().mean().backward()
    assert_close({n: p.grad for n, p in fused.named_parameters()}, gradients(native, x))


def test_func_grad_functional_call_and_vmap():
    native, fused = pair(LeNet)
    x, target = batch(native)
    parameters = {n: p.detach() for n, p in native.named_parameters()}

    def loss(parameters, x, target, model):
        out = torch.func.functional_call(model, parameters, (x.view(-1, *LeNet.image),))
        return F.cross_entropy(out, target.view(-1))

    def per_sample(model):
        grad = torch.func.grad(loss)
        return torch.func.vmap(grad, (None, 0, 0, None))(parameters, x, target, model)

    ours, expected = (torch.func.grad(loss)(parameters, x, target, m) for m in (fused, native))
    assert_close(ours, expected)
    assert_close(per_sample(fused), per_sample(native))
    out, expected = (torch.func.vmap(lambda x, m=m: m(x[None])[0])(x) for m in (fused, native))
    assert_close(out, expected)


def test_moving_average():
    native, fused = pair(Normed)
    averages = [torch.optim.swa_utils.AveragedModel(m, use_buffers=True) for m in (native, fused)]
    for average, model in zip(averages, (native, fused), strict=True):
        for scale in (1.0, 2.0, 4.0):
            with torch.no_grad():
                model.conv1.weight.mul_(scale)
            average.update_parameters(model)
    x, _ = batch(native)
    assert_close(averages[1].eval()(x), averages[0].eval()(x))
    assert_close(averages[1].state_dict(), averages[0].state_dict())


def test_clipping_and_weight_norm():
    native, fused = pair(LeNet)
    x, target = batch(native)
    norms = []
    for model in (native, fused):
        nn.utils.parametrizations.weight_norm(model.conv1)
        grads = gradients(model, x, target)
        assert "conv1.parametrizations.weight.original0" in grads
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    assert_close(norms[1], norms[0])
    assert_close(*({n: p.grad for n, p in m.named_parameters()} for m in (fused, native)))


# --------------------------------------------------------------------------------------- tools


@pytest.mark.parametrize("make", [LeNet, MnistExample])
def test_flop_counter(make):
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair(make):
        x, target = batch(model, 4)
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(x), target).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_flop_counter_of_an_exported_model(mode):
    from torch.utils.flop_counter import FlopCounterMode

    native, program = exported_step()
    counts = []
    for model in (native, program.module()):
        with mode(), FlopCounterMode(display=False) as counter:
            model(*batch(native))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flop_counter_of_the_ops_with_every_argument():
    """A first layer's input needs no gradient; arguments behind the flags change nothing."""
    from torch.utils.flop_counter import FlopCounterMode

    ops, x, w = torch.ops.fastcls, torch.randn(2, 3, 9, 9), torch.randn(5, 3, 3, 3)
    geometry = ([1, 1], [0, 0], [1, 1], 1, True, [2, 2], [2, 2], [0, 0], False)
    flops = 2 * 2 * (5 * 7 * 7) * (3 * 3 * 3)
    with FlopCounterMode(display=False) as forward:
        out, winner = ops.conv_block_forward(x, w, None, *geometry, True)
    assert forward.get_total_flops() == flops
    for needs, passes in [((False, True, True), 1), ((True, True, True), 2)]:
        for rest in [(), (True,)]:
            with FlopCounterMode(display=False) as backward:
                ops.conv_block_backward(out, x, w, winner, *geometry, *needs, *rest)
            assert backward.get_total_flops() == passes * flops


def test_profiler_names_the_ops():
    _, fused = pair(LeNet)
    x, target = batch(fused)
    with torch.profiler.profile() as profile:
        F.cross_entropy(fused(x), target).backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls[FORWARD] == calls[BACKWARD] == 2


def test_anomaly_mode_names_the_op():
    _, fused = pair(lambda: layers(conv(), nn.ReLU(), nn.MaxPool2d(2)))
    x, _ = batch(fused)
    with (
        torch.autograd.detect_anomaly(check_nan=True),
        pytest.warns(UserWarning, match="Traceback"),
    ):
        fused(x).sum().backward()
        with pytest.raises(RuntimeError, match=r"ConvBlock.* returned nan values"):
            (fused(x) * torch.inf).sum().backward()
