"""Nets as users write them, for the tests of ``fuse`` and of what it meets."""

import torch
import torch.nn.functional as F
from torch import nn


class MnistExample(nn.Module):
    """The net of PyTorch's MNIST example: functions in ``forward``, log-softmax at the end."""

    image = (1, 28, 28)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(x)
        x = self.conv2(x)
        x = F.relu(x)
        x = F.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = self.fc1(x)
        x = F.relu(x)
        x = self.dropout2(x)
        x = self.fc2(x)
        return F.log_softmax(x, dim=1)


class LeNet(nn.Module):
    """LeNet-5 as in PyTorch's first tutorial: one pool module serves both convolutions."""

    image = (3, 32, 32)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Net(nn.Module):
    """Two convolutions, and whatever modules else; subclasses have the ``forward``."""

    image = (3, 12, 12)

    def __init__(self, **modules):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.norm = nn.BatchNorm2d(4)
        for name, module in modules.items():
            setattr(self, name, module)


def layers(*modules, image=(3, 12, 12)):
    net = nn.Sequential(*modules)
    net.image = image
    return net


def conv(inputs=3, outputs=4, **arguments):
    return nn.Conv2d(inputs, outputs, 3, **{"padding": 1, **arguments})


class Functions(Net):
    def forward(self, x):
        x = torch.max_pool2d(self.conv1(x).relu(), 2)
        return F.max_pool2d(torch.relu(self.conv2(x)), kernel_size=3, stride=1, padding=1)


class InPlace(Net):
    def forward(self, x):
        x = F.max_pool2d(nn.functional.relu_(self.conv1(x)), 2)
        return F.relu(self.conv2(x), inplace=True) * 2


class PoolFirst(Net):
    def forward(self, x):
        return F.relu(self.pool(self.conv2(F.relu(F.max_pool2d(self.conv1(x), 2)))))


class Attributes(Net):
    """Modules that serve twice, one of them behind no convolution."""

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        return self.relu(self.conv2(x) + x)


class FunctionalConv(Net):
    def forward(self, x):
        w, b = self.conv1.weight, self.conv1.bias
        x = F.max_pool2d(F.relu(F.conv2d(x, w, b, padding=1)), 2)
        x = torch.conv2d(x, self.conv2.weight, None, 1, 1)
        x = F.batch_norm(
            x, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias,
            training=self.training,
        )  # fmt: skip
        return F.max_pool2d(F.relu(x), 2)


class Dropouts(Net):
    """What ``training`` decides must stay undecided."""

    def forward(self, x):
        x = F.dropout(F.max_pool2d(F.relu(self.conv1(x)), 2), 0.5, training=self.training)
        if self.training:
            x = x + 1
        return F.relu(self.conv2(x))


class Normed(Net):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv1(x))), 2)
        return self.conv2(x)


class Inner(nn.Module):
    """A convolution whose ReLU and pool are somebody else's."""

    def __init__(self):
        super().__init__()
        self.conv = conv()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class Across(nn.Module):
    """Chains that go out of one module and into another."""

    image = (3, 12, 12)

    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.after = nn.Sequential(nn.Sequential(nn.MaxPool2d(2)), nn.Sequential(conv(4, 4)))

    def forward(self, x):
        return F.max_pool2d(self.after(F.relu(self.inner(x))).relu(), 2)


class Optional(Net):
    """An optional argument that is used, but never asked for."""

    def forward(self, x, scale=2.0):
        return F.max_pool2d(F.relu(self.conv1(x)), 2) * scale


class Losses(Net):
    """Returns the sum of all kinds of classification loss."""

    def __init__(self):
        super().__init__(
            cross_entropy=nn.CrossEntropyLoss(label_smoothing=0.1),
            log_softmax=nn.LogSoftmax(1),
            nll=nn.NLLLoss(weight=torch.arange(1.0, 5), ignore_index=1),
        )

    def forward(self, x):
        x = self.conv1(x)
        logits = x.mean((2, 3))
        target = logits.detach().argmin(1)
        return (
            self.cross_entropy(logits, target)
            + F.cross_entropy(logits, target, reduction="sum")
            + self.nll(self.log_softmax(logits), target)
            + F.nll_loss(F.log_softmax(logits, dim=-1), target)
            + F.nll_loss(x.log_softmax(1), x.detach().argmin(1))
            + F.nll_loss(torch.log_softmax(logits, 1), target, reduction="none").mean()
        )
