"""fuse and the order of what forward computes and overwrites."""

import pytest
import torch
import torch.nn.functional as F
from fuse_problems import assert_same_numbers, in_graphs_alone, made
from nets import Net
from torch import nn

from fastcls import fuse, fusion_report
from fastcls.fusing.dynamo import fastcls as in_graphs


class LateScale(Net):
    def forward(self, x):
        h = F.conv2d(x, self.conv1.weight)
        gamma = self.norm.weight * 2
        mean, var = self.norm.running_mean, self.norm.running_var
        return F.relu(F.batch_norm(h, mean, var, gamma, self.norm.bias))


def test_a_batch_norm_whose_weight_comes_late():
    native = made(LateScale)
    assert_same_numbers(fuse(native), native)
    torch._dynamo.reset()
    assert_same_numbers(torch.compile(native, backend=in_graphs), native)


class ChangesNorm(Net):
    """What batch norm goes by is written to between it and its convolution, or read beside it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.norm.running_mean.fill_(-3)  # ReLU leaves it all

    def forward(self, x):
        gamma, beta = self.norm.weight.detach(), self.norm.bias.detach()
        mean, var = self.norm.running_mean, self.norm.running_var
        if self.how == "module":
            h = self.conv1(x)
            mean.mul_(0.5)
            return self.relu(self.norm(h))
        if self.how == "beside":
            h = self.conv1(x)
            before = mean * 1
            return self.relu(self.norm(h)) + before.sum()
        h = F.conv2d(x, self.conv1.weight)
        if self.how == "method":
            mean.mul_(0.5)
        elif self.how == "item":
            gamma[0] = 2
        elif self.how == "out":
            torch.add(mean, 1, out=mean)
        elif self.how == "operator":
            beta += 1
        elif self.how == "inplace":
            F.relu(mean, True)
        else:
            F.batch_norm(x[:, :1].expand(-1, 4, -1, -1), mean, var, training=True)
        return F.relu(F.batch_norm(h, mean, var, gamma, beta))


@pytest.mark.parametrize("compiled", [False, True], ids=["fuse", "compile"])
@pytest.mark.parametrize(
    "how", ["module", "beside", "method", "item", "out", "operator", "inplace", "statistics"]
)
def test_a_batch_norm_that_forward_changes(how, compiled):
    models = [made(lambda: ChangesNorm(how)) for _ in range(2)]
    native, fused = models[0], models[1]
    if compiled:
        torch._dynamo.reset()
        fused = torch.compile(fused, backend=in_graphs_alone)
    else:
        fused = fuse(fused)
    assert_same_numbers(fused, native)


class FunctionalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.weight)


class NormsChild(Net):
    def forward(self, x):
        return F.relu(F.batch_norm(self.child(x), self.norm.running_mean, self.norm.running_var))


def test_a_batch_norm_in_another_forward_than_the_convolution():
    native = made(lambda: NormsChild(child=FunctionalConv()))
    assert_same_numbers(fuse(native), native)


class Augmented(Net):
    """``x += 1`` for a view, an attribute of a tensor and a number."""

    def forward(self, x):
        x = x * 1
        view, transposed, n = x.view(-1), x.mT, x.shape[0]
        m = n
        m += 1
        view += n
        transposed *= m
        return F.relu(self.conv1(x))


def test_augmented_assignments_reach_what_shares_memory():
    native = made(Augmented)
    fused = fuse(native)
    assert len(fusion_report(fused).fused) == 1
    assert_same_numbers(fused, native)


class Overwrites(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.fc, self.relu = how, nn.Linear(6, 5), nn.ReLU(inplace=True)

    def forward(self, x):
        with torch.no_grad():
            z = self.fc(x)
        lp = F.log_softmax(z, 1)
        if self.how == "function":
            F.relu(z, inplace=True)
        elif self.how == "module":
            self.relu(z)
        elif self.how == "view":
            z.view(-1).zero_()
        elif self.how == "detached":
            z.detach().zero_()
        else:
            z[:, 0] = 0.0
        return F.nll_loss(lp, torch.arange(4) % 5) + x.sum() * 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["function", "module", "view", "detached", "item"])
def test_logits_that_are_overwritten(how, compiled):
    native = made(lambda: Overwrites(how))
    if compiled:
        torch._dynamo.reset()
        fused = torch.compile(native, backend=in_graphs)
    else:
        fused = fuse(native)
    assert_same_numbers(fused, native, shape=(4, 6))
