"""The training loop that all recipes share; it reads and writes no files (see ``runs``)."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from types import ModuleType

import torch

from fastcls import distributed
from fastcls.config import Config, make_optimizer
from fastcls.data import Batches, Data
from fastcls.distributed import ALONE, Share
from fastcls.graphs import GraphedStep
from fastcls.models import LAYERS


class Trainer:
    """Everything a run carries from step to step, and the steps.

    Args:
        recipe: a module of ``fastcls.recipes``.
        config: its settings.
        data: its batches; they move to ``device``.
        device: where the model goes.
        share: the part of each batch that this process takes; default all of it.
        tell: told in a sentence what the user should know of; default ``print``.
        resumed: ``load_state_dict`` follows: the weights a run begins with need not be there any
            more. Default False.

    Attributes:
        epoch: epochs finished.
        step: steps done in the running epoch.
        history: one dict of metrics per finished epoch.
    """

    def __init__(
        self,
        recipe: ModuleType,
        config: Config,
        data: Data,
        device: torch.device,
        share: Share = ALONE,
        tell: Callable[[str], None] = print,
        resumed: bool = False,
    ):
        torch.manual_seed(config.seed)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        self.recipe = recipe.__name__.rpartition(".")[2].replace("_", "-")
        self.config, self.device, self.share = config, device, share
        self.data = data.to(device, share)
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        first = {"weights": "none"} if resumed and hasattr(config, "weights") else {}
        model = recipe.build_model(replace(config, **first), len(data.classes))
        self.model = model.to(device, memory_format=self.memory_format)
        self._trained, self._batch = self.model, None
        if share.world > 1:
            self._trained, self._batch = distributed.spread(self.model, share, device)
        self.loss_and_hits = LAYERS[config.layers].cross_entropy_with_hits
        self.optimizer = make_optimizer(self.model, config, device)
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
        self._run_step = self._graphed(tell) or self._compute

    def _graphed(self, tell: Callable[[str], None]) -> GraphedStep | None:
        if not self._on_cuda or not self.config.cuda_graph:
            return None
        if self.share.world > 1:
            tell("steps run without a CUDA graph: several processes share them")
            return None
        return GraphedStep(self._compute, self.optimizer, tell)

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
        self._trained.train()
        for images, labels in self.data.train.epoch(self.epoch, self.step):
            self.train_step(images, labels)
            progress(self.data.train.size(self.step - 1))
            if stop():
                break
        self.hits.item()  # waits for the device, so that the clock reads the work done
        self.seconds += time.perf_counter() - start
        return self.step == len(self.data.train)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """One step on images float32 [B, C, H, W] and labels int64 [B]; waits for nothing.

        They are this process's share of the batch at ``step``.
        """
        self._set_lr()
        if self._batch is not None:
            self._batch.size = self.data.train.size(self.step)
        loss = self._run_step(images.contiguous(memory_format=self.memory_format), labels)
        self.losses[self.step] = loss
        self.step += 1

    def _compute(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The step on the device; returns this process's part of the batch's loss."""
        self.optimizer.zero_grad()
        with self._autocast():
            logits = self._trained(images)
            loss, hits = self.loss_and_hits(
                logits,
                labels,
                reduction="mean" if self._batch is None else "sum",
                label_smoothing=self.config.label_smoothing,
            )
        if self._batch is not None:
            loss = loss / self._batch.size
        # The gradients of the processes are averaged, but the whole loss is the sum of theirs.
        self.scaler.scale(loss * self.share.world if self.share.world > 1 else loss).backward()
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.hits += hits
        return loss.detach()

    def lr(self) -> float:
        """The learning rate of the next step."""
        # A function of the step alone: nothing to save, and no order to get wrong.
        steps = len(self.data.train)
        middle = self.epoch * steps + self.step + 0.5
        return self.config.lr_at(middle / (self.config.epochs * steps))

    def recent_loss(self, steps: int = 50) -> float:
        """Mean loss of the last steps of the running epoch; waits for the device."""
        return self.losses[max(0, self.step - steps) : self.step].mean().item() * self.share.world

    def finish_epoch(self) -> tuple[dict, list[float]]:
        """Evaluate and close the epoch.

        Returns:
            Its metrics, also added to ``history``, and the loss of each of its steps. The
            training figures are those seen while training, dropout included; ``seconds`` and
            ``images_per_second`` are of the training steps alone.
        """
        train, losses = self.data.train, self.share.sum(self.losses.clone()).tolist()
        images = len(train.labels)
        weighted = (train.size(i) * loss for i, loss in enumerate(losses))
        metrics = {
            "epoch": self.epoch + 1,
            "train_loss": sum(weighted) / images,
            "train_accuracy": self.share.sum(self.hits.clone()).item() / images,
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
        logits, labels = self.predict(batches)
        # Plain cross-entropy: smoothing is a means of training, not a measure.
        loss, hits = self.loss_and_hits(logits, labels, reduction="sum")
        sums = self.share.sum(torch.stack([loss.double(), hits.double()]))
        loss, hits = (sums / len(batches.labels)).tolist()
        return loss, hits

    @torch.inference_mode()
    def predict(self, batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits float32 [N, classes] and labels int64 [N] of this process's share."""
        self.model.eval()
        logits, labels = [], []
        for images, truth in batches.epoch():
            with self._autocast():
                logits.append(self.model(images.contiguous(memory_format=self.memory_format)))
            labels.append(truth)
        return torch.cat(logits).float(), torch.cat(labels)

    def best_epoch(self) -> dict:
        """The metrics of the epoch of the least validation loss, or test loss without one."""
        key = "val_loss" if self.data.val is not None else "test_loss"
        # The first epoch wins where every loss is nan.
        return min(self.history, key=lambda m: math.inf if math.isnan(m[key]) else m[key])

    def is_finished(self) -> bool:
        """Whether all epochs are done, or ``patience`` of them brought nothing better."""
        if self.epoch >= self.config.epochs:
            return True
        patience = self.config.patience
        return bool(
            patience and self.history and self.epoch - self.best_epoch()["epoch"] >= patience
        )

    def state_dict(self) -> dict:
        """All that the numbers to come depend on: tensors and plain Python values.

        Every process must call it; they all get the same.
        """
        return {
            "recipe": self.recipe,
            "config": asdict(self.config),
            "classes": self.data.classes,
            "input": asdict(self.data.train.input),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self._on_cuda else None,
            },
            "epoch": self.epoch,
            "step": self.step,
            "losses": self.share.sum(self.losses.clone()),
            "hits": self.share.sum(self.hits.clone()),
            "seconds": self.seconds,
            "history": self.history,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from ``state``, whichever device it was saved on."""
        self.model.load_state_dict(state["model"])
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr  # a number or a tensor, as this device has it; set by each step
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"]["cpu"].cpu())
        if self._on_cuda and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"].cpu(), self.device)
        self.epoch, self.step = state["epoch"], state["step"]
        self.seconds, self.history = state["seconds"], state["history"]
        if self.share.rank == 0:  # they are sums over all processes
            self.losses.copy_(state["losses"])
            self.hits.copy_(state["hits"])

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _autocast(self) -> torch.autocast:
        dtype = torch.float16 if self._on_cuda else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.config.amp)

    def _set_lr(self) -> None:
        lr = self.lr()
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
