"""The classes that modules take on while they are fused, and give up again.

A fused model has the very modules of the native one, under the same names; some have another
class. So whatever refers to them, by whatever name, sees the change, and undoing it is exact.
"""

import weakref

from torch import nn

from fastcls.fusing import choice
from fastcls.modules import FusedConvBlock, FusedCrossEntropyLoss

_NATIVE_CLASS = "_fastcls_native_class"
_ADDED = "_fastcls_added"
_TIE = "_fastcls_tie"
_BONDS = "_fastcls_bonds"


def change_class(module: nn.Module, cls: type, **attributes) -> None:
    """Make ``module`` a ``cls`` with these attributes more, until ``restore_class``."""
    added = [name for name in attributes if name not in vars(module)]
    vars(module).update(attributes, **{_NATIVE_CLASS: type(module), _ADDED: added})
    module.__class__ = cls


def restore_class(module: nn.Module) -> None:
    """Undo ``change_class``; nothing happens to other modules."""
    native = vars(module).pop(_NATIVE_CLASS, None)
    if native is None:
        return
    for name in vars(module).pop(_ADDED):
        del vars(module)[name]
    cls = type(module)
    if nn.utils.parametrize.is_parametrized(module):  # since then: in a class derived from ours
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        native = type(f"Parametrized{native.__name__}", (native,), own)
    module.__class__ = native


class Tie:
    """From a convolution to the batch norm that it folds; both hold it, it holds neither.

    So whoever copies or pickles the two together makes a tie between the copies, which the copied
    batch norm binds; a copy of the convolution alone has a loose end.
    """

    def __init__(self, name: str):
        self.name = name
        self._batch_norm = self._owner = _nothing

    def __reduce__(self):
        return Tie, (self.name,)

    def bind(self, batch_norm: nn.Module, owner: nn.Module | None = None) -> None:
        """``owner`` has ``batch_norm`` as its child ``name``; None: not known."""
        if self._batch_norm() is None:  # not so for a shallow copy
            self._batch_norm = weakref.ref(batch_norm)
            self._owner = _nothing if owner is None else weakref.ref(owner)

    def batch_norm(self) -> nn.Module:
        batch_norm, owner = self._batch_norm(), self._owner()
        is_there = owner is None or owner._modules.get(self.name) is batch_norm
        if not (is_there and isinstance(batch_norm, AbsorbedBatchNorm2d)):
            raise RuntimeError(
                f"FusedConvBlock: the BatchNorm2d {self.name!r} that fuse folds into it was "
                "replaced, or not copied along; unfuse the model before you take it apart"
            )
        return batch_norm


def _nothing():
    return None


class Bond:
    """Between a convolution and a module whose work it does: neither goes on without the other.

    Both hold it, it holds neither, as with ``Tie``. What is copied or pickled alone is free, and
    what a wrapper holds is still there.
    """

    def __init__(self):
        self._ends = []

    def __reduce__(self):
        return Bond, ()

    def bind(self, module: nn.Module) -> None:
        if len(self._ends) < 2:  # not so for a shallow copy
            self._ends.append(weakref.ref(module))

    def check(self) -> None:
        for end in self._ends:
            if end() is None:
                raise RuntimeError(
                    "FusedConvBlock: a layer of the chain that fuse made one op of was replaced; "
                    "unfuse the model before you take it apart"
                )


class Bonded(nn.Module):
    """One of those that bonds hold together."""

    def __setstate__(self, state):  # of a copy
        super().__setstate__(state)
        for bond in vars(self)[_BONDS]:
            bond.bind(self)

    def check_bonds(self) -> None:
        for bond in vars(self)[_BONDS]:
            bond.check()


class SwappedConvBlock(Bonded, FusedConvBlock):
    """A convolution of the user's that does the steps after it too.

    With batch norm among them it folds it into the weight in evaluation, anew in each call, since
    all of its parts may change; in training it does the steps one by one.
    """

    def _get_name(self):
        return "FusedConvBlock"

    def forward(self, input):
        self.check_bonds()
        weight, bias = self.weight, self.bias
        if self.batch_norm is not None:
            batch_norm = self.batch_norm.batch_norm()
            if batch_norm.training or batch_norm.running_mean is None:
                return self._step_by_step(batch_norm, input)
            weight, bias = choice.fold_batch_norm(
                weight,
                bias,
                batch_norm.running_mean,
                batch_norm.running_var,
                batch_norm.weight,
                batch_norm.bias,
                batch_norm.eps,
            )
        return self._block(choice.conv_block, input, weight, bias)

    def _step_by_step(self, batch_norm, input):
        out = self._conv_forward(input, self.weight, self.bias)
        out = nn.BatchNorm2d.forward(batch_norm, out)
        return choice.relu_and_pool(
            out,
            self.activation,
            self.pool_size,
            self.pool_stride,
            self.pool_padding,
            self.ceil_mode,
        )

    def to_native(self):
        raise RuntimeError("to_native: this layer is part of a fused model; fastcls.unfuse it")

    def extra_repr(self):
        text = super().extra_repr()
        return text if self.batch_norm is None else f"{text}, batch_norm={self.batch_norm.name!r}"


class Absorbed(Bonded, nn.Identity):
    """Holds the place of a module whose work a fused one does."""

    def _get_name(self):
        return f"Absorbed{vars(self)[_NATIVE_CLASS].__name__}"

    def forward(self, input):
        self.check_bonds()
        return input


class AbsorbedBatchNorm2d(nn.BatchNorm2d):
    """Keeps parameters, statistics and mode for the convolution that does its work."""

    def __setstate__(self, state):  # of a copy
        super().__setstate__(state)
        vars(self)[_TIE].bind(self)

    def forward(self, input):
        return input


class SwappedNLLLoss(FusedCrossEntropyLoss):
    """Negative log-likelihood that does the log-softmax before it too."""

    def forward(self, input, target):
        return choice.nll_of_log_softmax(
            input, target, self.weight, self.ignore_index, self.reduction, dim=self.dim
        )


def swap_conv(conv: nn.Conv2d, tie: Tie | None, *, activation, pool_size, **pool) -> None:
    """Give ``conv`` the steps after it, in the names of ``FusedConvBlock``.

    ``tie``: to the batch norm among them.
    """
    block = {"pool_stride": None, "pool_padding": 0, "ceil_mode": False, **pool}
    block |= {"pool_size": pool_size, "activation": activation, "batch_norm": tie}
    change_class(conv, SwappedConvBlock, **block, **{_BONDS: []})


def absorb(module: nn.Module) -> None:
    """Make ``module`` hand its input through."""
    change_class(module, Absorbed, **{_BONDS: []})


def bond(conv: nn.Conv2d, absorbed: nn.Module) -> None:
    """From now on each of the two notices when the other is replaced."""
    between = Bond()
    for module in (conv, absorbed):
        between.bind(module)
        vars(module)[_BONDS].append(between)


def absorb_batch_norm(owner: nn.Module, name: str) -> Tie:
    """Make this child of ``owner`` hand its input through; the tie for the convolution."""
    tie, batch_norm = Tie(name), owner._modules[name]
    tie.bind(batch_norm, owner)
    change_class(batch_norm, AbsorbedBatchNorm2d, **{_TIE: tie})
    return tie


def swap_cross_entropy(loss: nn.CrossEntropyLoss) -> None:
    change_class(loss, FusedCrossEntropyLoss)


def swap_nll_loss(loss: nn.NLLLoss, dim: int) -> None:
    change_class(loss, SwappedNLLLoss, label_smoothing=0.0, dim=dim)
