"""The pictures of a run, drawn straight to files."""

from pathlib import Path

import torch

from fastcls.errors import import_extra

Figure = import_extra("matplotlib.figure").Figure

LABELS = {"train": "training", "val": "validation", "test": "test"}
COLOURS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:red"}
RIGHT, WRONG = "tab:green", "tab:red"


def curves(history: list[dict], step_losses: list[float], file: Path) -> None:
    """Loss and accuracy over the epochs, side by side, with every step's loss as a thin line.

    Args:
        history: one dict of metrics per epoch, accuracies as fractions.
        step_losses: the loss of each training step of these epochs.
        file: where the PNG goes.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    per_epoch = len(step_losses) / len(history)
    at = [step / per_epoch for step in range(1, len(step_losses) + 1)]
    left.plot(at, step_losses, color=COLOURS["train"], alpha=0.35, linewidth=0.6, label="each step")
    for axes, figure_name in ((left, "loss"), (right, "accuracy")):
        for part in LABELS:
            _plot_epochs(axes, history, part, figure_name)
        axes.set(xlabel="epoch", ylabel=figure_name, xlim=(0, len(history) * 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    left.set_ylim(bottom=0)
    right.yaxis.set_major_formatter(import_extra("matplotlib.ticker").PercentFormatter(1))
    figure.savefig(file, dpi=120)


def _plot_epochs(axes, history: list[dict], part: str, figure_name: str) -> None:
    key = f"{part}_{figure_name}"
    if key in history[0]:
        axes.plot(
            [metrics["epoch"] for metrics in history],
            [metrics[key] for metrics in history],
            marker="o",
            markersize=3.5,
            color=COLOURS[part],
            label=LABELS[part],
        )


def predictions(
    images: torch.Tensor,
    labels: torch.Tensor,
    predicted: torch.Tensor,
    classes: list[str],
    file: Path,
) -> None:
    """The first 20 images in two rows, each titled with its prediction.

    A right prediction is green; a wrong one is red, with the true class below the image.

    Args:
        images: uint8 [N, C, H, W], C = 1 (grey) or 3.
        labels, predicted: int64 [N].
        classes: the name of each class.
        file: where the PNG goes.
    """
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    pixels = images[:20].permute(0, 2, 3, 1).cpu().numpy()
    truth, guesses = labels[:20].tolist(), predicted[:20].tolist()
    for i, axes in enumerate(figure.subplots(2, 10).flat):
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
        if i >= len(pixels):
            continue
        axes.imshow(pixels[i], cmap="gray", vmin=0, vmax=255)
        right = guesses[i] == truth[i]
        axes.set_title(classes[guesses[i]], color=RIGHT if right else WRONG)
        if not right:
            axes.set_xlabel(f"is {classes[truth[i]]}")
    figure.savefig(file, dpi=120)
