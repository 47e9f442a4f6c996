"""The settings of a run, and the schedules and optimisers that they name."""

import math
from dataclasses import dataclass

import torch

from fastcls.errors import UserError
from fastcls.models import LAYERS


@dataclass(kw_only=True)
class Config:
    """What a run computes: the same settings give the same numbers.

    A recipe's own ``Config`` sets the defaults that have none here and adds fields of its own.
    """

    epochs: int
    batch_size: int  # of all processes together
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9  # of "sgd" alone
    weight_decay: float = 0.0
    schedule: str = "constant"
    clip_norm: float | None = None  # the largest norm of all gradients together; None: no limit
    label_smoothing: float = 0.0
    patience: int | None = None  # stop after this many epochs without a better one; None: never
    shuffle: bool = True
    layers: str = "fused"
    amp: bool = False  # float16 on CUDA, bfloat16 on the CPU
    channels_last: bool = False
    cuda_graph: bool = True  # on CUDA: one launch for all kernels of a step
    seed: int = 0

    def __post_init__(self):
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("layers", LAYERS),
        ):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}"
                )
        for name in ("epochs", "batch_size", "patience"):
            value = getattr(self, name)
            if (value is not None or name != "patience") and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if (value is not None or name != "clip_norm") and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number, got {value}")
        if not 0 <= self.label_smoothing <= 1:
            raise UserError(f"label_smoothing must be in 0..1, got {self.label_smoothing}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in 0..2**32 - 1, got {self.seed}")

    def lr_at(self, part: float) -> float:
        """The learning rate where ``part`` of all steps is done, 0 < part < 1."""
        return self.lr * SCHEDULES[self.schedule](part)


def _one_cycle(part: float) -> float:
    """Up in a line over the first 30 %, then down along a half cosine to nothing."""
    return part / 0.3 if part < 0.3 else _cosine((part - 0.3) / 0.7)


def _cosine(part: float) -> float:
    return (1 + math.cos(math.pi * part)) / 2


# The factor on ``lr`` as a function of the part of all steps done, 0 < part < 1. It is taken in the
# middle of a step, so that no step has the rate 0 of either end, and thirds end with whole steps.
SCHEDULES = {
    "constant": lambda part: 1.0,
    "cosine": _cosine,
    "linear": lambda part: 1 - part,
    "one-cycle": _one_cycle,
    "step": lambda part: 0.1 ** int(3 * part),  # a tenth after each third
}

# Fused: one kernel for all parameters, which also takes GradScaler's verdict without a sync.
OPTIMIZERS = {
    "sgd": lambda parameters, c: torch.optim.SGD(
        parameters, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=True
    ),
    "nesterov": lambda parameters, c: torch.optim.SGD(
        parameters,
        lr=c.lr,
        momentum=c.momentum,
        weight_decay=c.weight_decay,
        nesterov=True,
        fused=True,
    ),
    "adam": lambda parameters, c: torch.optim.Adam(
        parameters, lr=c.lr, weight_decay=c.weight_decay, fused=True
    ),
    "adamw": lambda parameters, c: torch.optim.AdamW(
        parameters, lr=c.lr, weight_decay=c.weight_decay, fused=True
    ),
}


def make_optimizer(model: torch.nn.Module, config: Config, device: torch.device):
    """The optimiser of the parameters that train, its state complete from the start."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS[config.optimizer](parameters, config)
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for p in group["params"]:
                # Made by the first step, it would hold garbage where GradScaler skips that step.
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if device.type == "cuda":
            # Read by the kernels: a captured step follows the schedule, and nothing waits.
            group["lr"] = torch.tensor(config.lr, device=device)
    return optimizer
