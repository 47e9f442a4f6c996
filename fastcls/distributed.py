"""One batch over several processes: the numbers stay those of one process, up to rounding.

Each process takes every ``world``-th image of a batch. What depends on the whole batch, the masks
of dropout and the statistics of batch normalisation, is made for the whole batch.
"""

import gc
import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fastcls.errors import UserError


@dataclass(frozen=True)
class Share:
    """The part of every batch that this process takes."""

    rank: int = 0
    world: int = 1

    def rows(self, first: int, end: int) -> slice:
        """Its rows of a batch that is ``first:end`` of a list or tensor."""
        return slice(first + self.rank, end, self.world)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` summed over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


ALONE = Share()


def join(device: str) -> tuple[Share, torch.device]:
    """Meet the other processes of ``torchrun``; alone without it.

    Returns:
        The share of this process and its device: ``cuda`` becomes the GPU of its local rank.

    Raises:
        UserError: more processes than GPUs on this machine.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE, torch.device(device)
    device = torch.device(device)
    if device.type == "cuda":
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"no GPU of its own: process {local} of a machine with {gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # The flags that processes exchange between steps live on the CPU whatever the device.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return Share(dist.get_rank(), dist.get_world_size()), device


def leave() -> None:
    """End what :func:`join` began; the caller has let go of every model that was spread.

    A group that a model still holds outlives this call, and its threads abort the process if they
    drop a tensor while the interpreter shuts down.
    """
    if dist.is_initialized():
        gc.collect()  # models sit in cycles
        dist.destroy_process_group()


def agreed(flag: bool, share: Share) -> bool:
    """Whether ``flag`` is set in any of the processes."""
    return share.sum(torch.tensor(int(flag))).item() > 0


class _Batch:
    """Shared by the layers of a model: how many images the whole batch has."""

    size: int


def spread(model: nn.Module, share: Share, device: torch.device) -> tuple[nn.Module, _Batch]:
    """Wrap ``model`` so that the processes' gradients are averaged; its layers change in place.

    Returns:
        The wrapped model, and the record whose ``size`` must be set before each training step.
    """
    batch = _Batch()
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Dropout):
                setattr(parent, name, _Dropout(layer, share, batch))
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, _BatchNorm(layer, batch))
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids), batch


class _Dropout(nn.Module):
    """Draws the mask of the whole batch and keeps this process's rows."""

    def __init__(self, layer: nn.Dropout, share: Share, batch: _Batch):
        super().__init__()
        self.p, self.share, self.batch = layer.p, share, batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        # Numbers are drawn in the order of the memory: as x has it, so that channels-last stays so.
        shape, order = (self.batch.size, *x.shape[1:]), x.dim_order()
        ones = torch.empty_permuted(shape, order, dtype=x.dtype, device=x.device).fill_(1)
        return x * F.dropout(ones, self.p)[self.share.rows(0, self.batch.size)]


class _BatchNorm(nn.Module):
    """Batch normalisation with the whole batch's statistics; unlike SyncBatchNorm, on CPUs too.

    Parameters and buffers keep the names that the layer gave them.
    """

    def __init__(self, layer: nn.BatchNorm1d | nn.BatchNorm2d, batch: _Batch):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)
        self.momentum, self.eps, self.batch = layer.momentum, layer.eps, batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        axes = [0, *range(2, x.dim())]
        wide = [1, -1] + [1] * (x.dim() - 2)
        total = self.batch.size * math.prod(x.shape[2:])
        y = x.float()
        mean = _Sum.apply(y.sum(axes)) / total
        centred = y - mean.view(wide)
        variance = _Sum.apply(centred.square().sum(axes)) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (total / max(1, total - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale.view(wide) + self.bias.view(wide)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """A sum over all processes; each process's loss depends on it, so the gradient is a sum too."""

    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total
