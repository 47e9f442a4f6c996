"""Swaps the layers of any model for the fused ops, wherever that is proved equal."""

import copy
import warnings

import torch
from torch import nn

from fastcls.fusing.apply import apply
from fastcls.fusing.plan import make_plan
from fastcls.fusing.report import FusionReport, Row
from fastcls.fusing.swapped import restore_class

__all__ = ["FusionReport", "Row", "fuse", "fusion_report", "unfuse"]

_REPORT = "_fastcls_report"


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with its chains of layers swapped for fused ops, wherever that is proved equal.

    conv → ReLU (→ max-pool), conv → max-pool (→ ReLU), conv → BatchNorm → ReLU (→ max-pool), where
    the batch norm is folded in evaluation; cross-entropy; log-softmax → negative log-likelihood: as
    modules and as functions, in ``nn.Sequential`` and in any ``forward`` that torch.fx can trace.

    Parameters and buffers are the same objects in both models, so that optimisers made before go
    on working; names, ``state_dict``, modes, hooks and classes stay. Nothing is done by halves: a
    chain that cannot be proved equal stays as it is, and ``fusion_report`` says why.

    Args:
        model: any module; itself unchanged unless ``inplace``.
        inplace: change ``model`` itself instead of a copy that shares its parameters.

    Warns:
        UserWarning: nothing was fused.

    Raises:
        TypeError: not a module, or one wrapped by torch.compile, torch.jit or a parallel wrapper:
            fuse the model inside first; or one that ``copy.deepcopy`` cannot copy.
    """
    _check_model("fuse", model)
    model = _unfused("fuse", model, inplace)
    plan = make_plan(model)
    report = plan.report()  # in the names of the native classes
    apply(plan)
    vars(model)[_REPORT] = report
    if not report.fused:
        warnings.warn(_nothing_fused(model, report), stacklevel=2)
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model as it was before ``fuse``, on the same parameters; blocks made by hand stay.

    Args:
        model: a fused model, or any other; itself unchanged unless ``inplace``.
        inplace: change ``model`` itself instead of a copy that shares its parameters.

    Raises:
        TypeError: as ``fuse``.
    """
    _check_model("unfuse", model)
    return _unfused("unfuse", model, inplace)


def fusion_report(model: nn.Module) -> FusionReport:
    """What ``fuse`` did to this model, or would do: each chain, and why those left were left.

    Raises:
        TypeError: as ``fuse``.
    """
    _check_model("fusion_report", model)
    report = vars(model).get(_REPORT)
    if report is None:
        report = make_plan(_unfused("fusion_report", model, inplace=False)).report()
    return report


def _nothing_fused(model, report):
    rows = [f"{row.where}: {row.chain}: {row.reason}" for row in report]
    why = [*report.notes, *rows, "it has no such chain"][0]
    return f"fuse: nothing in {type(model).__name__} was fused: {why}; see fusion_report(model)"


def _unfused(function, model, inplace):
    model = model if inplace else _twin(function, model)
    for module in model.modules():
        vars(module).pop(_REPORT, None)
        restore_class(module)
    return model


def _check_model(function, model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
    wrappers = {"OptimizedModule", "ScriptModule", "DataParallel", "DistributedDataParallel"}
    if wrappers & {cls.__name__ for cls in type(model).__mro__}:  # torch._dynamo is slow to import
        raise TypeError(
            f"{function}: model must not be wrapped, got {type(model).__name__}: "
            f"{function} the model inside, then wrap it"
        )


def _twin(function, model):
    """A copy with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [v for v in vars(module).values() if isinstance(v, torch.Tensor)]
    try:
        return copy.deepcopy(model, {id(t): t for t in tensors})
    except Exception as error:  # of whatever the user's modules hold
        instead = "" if function == "fusion_report" else "; inplace=True changes the model itself"
        raise TypeError(
            f"{function}: {type(model).__name__} cannot be copied ({error}){instead}"
        ) from error
