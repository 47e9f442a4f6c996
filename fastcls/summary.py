"""What a run tells of itself: a row per epoch, and the figures of the best model at the end."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

# A top-5 of ten classes says little.
TOP_5_FROM = 20


@dataclass
class ClassFigures:
    """One class: images to train on, images to test with, and how many of these were right."""

    name: str
    trained: int
    tested: int
    right: int

    @property
    def accuracy(self) -> float:
        """A fraction; there is none of a class without test images."""
        return self.right / self.tested


class Outcome:
    """The predictions of a model for the test images.

    Args:
        logits: float32 [N, classes].
        labels: int64 [N].
        train_labels: int64, of the images it was trained on.
        classes: the name of each class.
    """

    def __init__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        train_labels: torch.Tensor,
        classes: list[str],
    ):
        self.logits, self.labels = logits.cpu(), labels.cpu()
        self.train_labels, self.classes = train_labels.cpu(), classes

    @cached_property
    def predicted(self) -> torch.Tensor:
        """int64 [N]; ``len(classes)``, which is no class, where a logit is NaN."""
        return self.logits.argmax(1).masked_fill(self.logits.isnan().any(1), len(self.classes))

    def confusion(self) -> torch.Tensor:
        """int64 [true class, predicted class]: images, without those that have no prediction."""
        n = len(self.classes)
        counts = torch.bincount(self.labels * (n + 1) + self.predicted, minlength=n * (n + 1))
        return counts.view(n, n + 1)[:, :n]

    def per_class(self) -> list[ClassFigures]:
        trained, tested = (
            torch.bincount(labels, minlength=len(self.classes)).tolist()
            for labels in (self.train_labels, self.labels)
        )
        figures = (trained, tested, self.confusion().diagonal().tolist())
        return [ClassFigures(*row) for row in zip(self.classes, *figures, strict=True)]

    def top(self, k: int) -> int:
        """Images whose class is among the k likeliest; of equal logits the first come first.

        Not by ``topk``, whose order of equal logits is another than that of ``argmax``.
        """
        place = self.labels.unsqueeze(1)
        own = self.logits.gather(1, place)
        earlier = torch.arange(len(self.classes)) < place
        ahead = (self.logits > own) | (self.logits == own) & earlier
        known = self.predicted < len(self.classes)
        return ((ahead.sum(1) < k) & known).sum().item()

    def figures(self) -> dict:
        """Loss, accuracy, top-5 where there are many classes, and accuracy per class."""
        figures = {
            "test_loss": F.cross_entropy(self.logits, self.labels).item(),
            "test_accuracy": self.top(1) / len(self.labels),
        }
        if len(self.classes) >= TOP_5_FROM:
            figures["test_top5"] = self.top(5) / len(self.labels)
        return figures | {"classes": [vars(c) for c in self.per_class()]}

    def text(self) -> str:
        """The figures in lines, a table of the classes last."""
        n, right = len(self.labels), self.top(1)
        figures = self.figures()
        lines = [f"test loss {figures['test_loss']:.4f}, accuracy {right / n:.2%} ({right} of {n})"]
        if "test_top5" in figures:
            lines.append(f"top-5 accuracy {self.top(5) / n:.2%} ({self.top(5)} of {n})")
        width = max(5, *map(len, self.classes))
        lines.append(f"{'class':<{width}}  accuracy  right    of  trained on")
        lines += [
            f"{c.name:<{width}}  {f'{c.accuracy:.2%}' if c.tested else '–':>8}"
            f"  {c.right:>5}  {c.tested:>4}  {c.trained:>10}"
            for c in self.per_class()
        ]
        return "\n".join(lines)


def table_row(metrics: dict, header: bool = False) -> str:
    """One epoch's figures in columns, below their names where ``header`` is true."""
    cells = {name.replace("_", " "): _cell(name, value) for name, value in metrics.items()}
    cells["images/s"] = cells.pop("images per second")
    row = "  ".join(f"{cell:>{len(name)}}" for name, cell in cells.items())
    return "  ".join(cells) + "\n" + row if header else row


def _cell(name: str, value: float) -> str:
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    if name.endswith("loss"):
        return f"{value:.4f}"
    return f"{value:.1f}" if name == "seconds" else f"{value:.0f}"
