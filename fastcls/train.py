"""The training loop that all recipes share; it reads and writes no files (see ``runs``)."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType

import torch

from fastcls.data import Batches, Data
from fastcls.errors import UserError
from fastcls.models import LAYERS


@dataclass(kw_only=True)
class Config:
    """What a run computes: the same settings give the same numbers.

    A recipe's own ``Config`` sets the defaults that have none here and adds fields of its own.
    """

    epochs: int
    batch_size: int
    lr: float
    optimizer: str = "sgd"
    momentum: float = 0.9  # of "sgd" alone
    schedule: str = "constant"
    shuffle: bool = True
    layers: str = "fused"
    amp: bool = False  # float16 on CUDA, bfloat16 on the CPU
    channels_last: bool = False
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
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr must be a positive number, got {self.lr}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in 0..2**32 - 1, got {self.seed}")


def _one_cycle(part: float) -> float:
    """Up in a line over the first 30 %, then down along a half cosine to nothing."""
    return part / 0.3 if part < 0.3 else (1 + math.cos(math.pi * (part - 0.3) / 0.7)) / 2


# The factor on ``lr`` as a function of the part of all steps done, 0 < part <= 1.
SCHEDULES = {"constant": lambda part: 1.0, "one-cycle": _one_cycle}

# Fused: one kernel for all parameters, which also takes GradScaler's verdict without a sync.
OPTIMIZERS = {
    "sgd": lambda parameters, c: torch.optim.SGD(
        parameters, lr=c.lr, momentum=c.momentum, fused=True
    ),
    "adam": lambda parameters, c: torch.optim.Adam(parameters, lr=c.lr, fused=True),
}


class Trainer:
    """Everything a run carries from step to step, and the steps.

    Args:
        recipe: a module of ``fastcls.recipes``.
        config: its settings.
        data: its batches, on ``device``.
        device: where the model goes.

    Attributes:
        epoch: epochs finished.
        step: steps done in the running epoch.
        history: one dict of metrics per finished epoch.
    """

    def __init__(self, recipe: ModuleType, config: Config, data: Data, device: torch.device):
        torch.manual_seed(config.seed)
        torch.backends.cudnn.deterministic = True
        self.config, self.data, self.device = config, data, device
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        self.model = recipe.build_model(config).to(device, memory_format=self.memory_format)
        self.criterion = LAYERS[config.layers].cross_entropy()
        self.optimizer = OPTIMIZERS[config.optimizer](self.model.parameters(), config)
        # bfloat16 has float32's range: only float16, on CUDA, needs its loss scaled.
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=config.amp and device.type == "cuda"
        )
        self.epoch = self.step = 0
        self.seconds = 0.0  # spent on the steps of the running epoch
        self.history: list[dict] = []
        # Filled on the device, read once per epoch: a read per step would wait for the device.
        self.losses = torch.zeros(len(data.train), device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)

    def train_epoch(
        self,
        stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda images: None,
    ) -> bool:
        """Train to the end of the epoch, from wherever it stands.

        Args:
            stop: asked after each step; True breaks off.
            progress: told after each step how many images it took.

        Returns:
            Whether the end of the epoch was reached.
        """
        start = time.perf_counter()
        self.model.train()
        for images, labels in self.data.train.epoch(self.epoch, self.step):
            self.train_step(images, labels)
            progress(len(labels))
            if stop():
                break
        self.hits.item()  # waits for the device, so that the clock reads the work done
        self.seconds += time.perf_counter() - start
        return self.step == len(self.data.train)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One step on images float32 [B, C, H, W] and labels int64 [B]; waits for nothing."""
        self._set_lr()
        self.optimizer.zero_grad()
        with self._autocast():
            logits = self.model(images.contiguous(memory_format=self.memory_format))
            loss = self.criterion(logits, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.losses[self.step] = loss.detach()
        self.hits += (logits.detach().argmax(1) == labels).sum()
        self.step += 1

    def finish_epoch(self) -> tuple[dict, list[float]]:
        """Evaluate and close the epoch.

        Returns:
            Its metrics, also added to ``history``, and the loss of each of its steps. The
            training figures are those seen while training, dropout included; ``seconds`` and
            ``images_per_second`` are of the training steps alone.
        """
        train, losses = self.data.train, self.losses.tolist()
        images = len(train.labels)
        sizes = [min(train.batch_size, images - i * train.batch_size) for i in range(len(train))]
        metrics = {
            "epoch": self.epoch + 1,
            "train_loss": sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / images,
            "train_accuracy": self.hits.item() / images,
        }
        for name, batches in (("val", self.data.val), ("test", self.data.test)):
            if batches is not None:
                loss, accuracy = self.evaluate(batches)
                metrics |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        metrics |= {"seconds": self.seconds, "images_per_second": images / self.seconds}
        self.history.append(metrics)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.hits.zero_()
        return metrics, losses

    @torch.inference_mode()
    def evaluate(self, batches: Batches) -> tuple[float, float]:
        """Mean loss and accuracy (a fraction) over all of ``batches``, without dropout."""
        logits = self.predict(batches)
        loss = self.criterion(logits, batches.labels)
        hits = logits.argmax(1) == batches.labels
        return loss.item(), hits.double().mean().item()

    @torch.inference_mode()
    def predict(self, batches: Batches) -> torch.Tensor:
        """Logits float32 [N, classes] of all images, in their order."""
        self.model.eval()
        with self._autocast():
            logits = [
                self.model(images.contiguous(memory_format=self.memory_format))
                for images, _ in batches.epoch()
            ]
        return torch.cat(logits).float()

    def best_epoch(self) -> dict:
        """The metrics of the epoch of the least validation loss, or test loss without one."""
        key = "val_loss" if self.data.val is not None else "test_loss"
        # The first epoch wins where every loss is nan.
        return min(self.history, key=lambda m: math.inf if math.isnan(m[key]) else m[key])

    def state_dict(self) -> dict:
        """All that the numbers to come depend on: tensors and plain Python values."""
        return {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self._on_cuda else None,
            },
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.losses,
            "hits": self.hits,
            "seconds": self.seconds,
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state``, whichever device it was saved on."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self._on_cuda and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.history = state["seconds"], state["history"]
        self.losses.copy_(state["losses"])
        self.hits.copy_(state["hits"])

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self._on_cuda else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.config.amp)

    def _set_lr(self) -> None:
        # A function of the step alone: nothing to save, and no order to get wrong.
        steps = len(self.data.train)
        part = (self.epoch * steps + self.step + 1) / (self.config.epochs * steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * SCHEDULES[self.config.schedule](part)
