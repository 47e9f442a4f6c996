"""A whole training step as one CUDA graph: one launch instead of one per kernel."""

import contextlib
from collections.abc import Callable

import torch

# Steps run as usual before the capture: by then cuBLAS and cuDNN have chosen and the optimiser's
# and GradScaler's tensors exist.
WARM_UP = 3

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class GraphedStep:
    """Replays ``step`` for batches of one shape; every other batch runs it as usual.

    The warm-up steps are steps of the training like any other, on the stream of the capture, so
    the numbers are those of a run without graphs.

    Args:
        step: from (images, labels) to the loss, on CUDA, waiting for nothing.
        optimizer: what ``step`` steps.
        tell: told in a sentence why there is no graph, where the capture fails.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer, tell: Callable[[str], None]):
        self.step, self.optimizer, self.tell = step, optimizer, tell
        self.graph: torch.cuda.CUDAGraph | None = None
        self.runs = 0  # in a row of one shape; no capture any more where it is None
        self.shape: torch.Size | None = None
        self.stream = torch.cuda.Stream()

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of the step; with a graph, valid until the next call."""
        if self.graph is not None and images.shape == self.shape:
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.graph.replay()
            return self.loss
        if self.graph is None and self.runs is not None:
            self._note(images)
            if self.runs > WARM_UP and self._capture(images, labels):
                return self(images, labels)
        return self._on_side_stream(images, labels)

    def _note(self, images: torch.Tensor) -> None:
        self.runs = self.runs + 1 if images.shape == self.shape else 1
        self.shape = images.shape

    def _on_side_stream(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        main = torch.cuda.current_stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            loss = self.step(images, labels)
        main.wait_stream(self.stream)
        for tensor in (images, labels):  # not to be given away while the side stream reads it
            tensor.record_stream(self.stream)
        loss.record_stream(main)
        return loss

    def _capture(self, images: torch.Tensor, labels: torch.Tensor) -> bool:
        self.images, self.labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with _capturable(self.optimizer), torch.cuda.graph(graph, stream=self.stream):
                self.loss = self.step(self.images, self.labels)
        except RuntimeError as error:
            self.runs = None
            self.tell(f"steps run without a CUDA graph: {str(error).splitlines()[0]}")
            return False
        self.graph = graph
        return True


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer):
    """Adam refuses a capture without this flag and warns of it outside of one."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
