"""What the tests of fuse compare: numbers of a fused model and of the native one."""

import torch

from fastcls.fusing.dynamo import swap_chains


def results(model, x, *more):
    """Output, whether it has a graph, and the gradients of input and parameters."""
    torch.manual_seed(0)  # of the dropouts
    x = x.clone().requires_grad_()
    out = model(x, *more)
    wanted = [x, *model.parameters()]
    graph = out.requires_grad
    grads = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True) if graph else []
    return [out.detach(), *grads]


def assert_same_numbers(fused, native, *more, shape=(2, 3, 12, 12)):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for mode in (True, False):
        ours, expected = (results(m.train(mode), x, *more) for m in (fused, native))
        assert len(ours) == len(expected)
        for got, want in zip(ours, expected, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def in_graphs_alone(gm, example_inputs):
    """The backend without Inductor."""
    swap_chains(gm)
    return gm.forward


def made(cls, **modules):
    torch.manual_seed(0)
    return cls(**modules)
