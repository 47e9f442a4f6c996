"""The pictures of a run, drawn straight to files."""

import os
from fractions import Fraction
from pathlib import Path

import torch

from fastcls.errors import UserError, import_extra
from fastcls.files import named_where_unwritten, write_atomically
from fastcls.summary import ClassFigures

Figure = import_extra("matplotlib.figure").Figure

LABELS = {"train": "training", "val": "validation", "test": "test"}
COLOURS = {"train": "tab:blue", "val": "tab:orange", "test": "tab:red"}
RIGHT, WRONG = "tab:green", "tab:red"


def check_file(file: str | os.PathLike) -> None:
    """Can a picture be written to a file of this name?

    Raises:
        UserError: it is a folder, or its ending is of no kind of picture that can be written.
    """
    endings = sorted(Figure().canvas.get_supported_filetypes())
    if Path(file).is_dir():
        raise UserError(f"a picture cannot be written to {file}, which is a folder")
    if Path(file).suffix.lower().removeprefix(".") not in endings:
        raise UserError(f"a picture must end in .{', .'.join(endings)}, got {file}")


def _save(figure: Figure, file: str | os.PathLike) -> None:
    for text in figure.findobj(import_extra("matplotlib.text").Text):
        text.set_parse_math(False)  # a dollar sign in a class name is one
    kind = Path(file).suffix.removeprefix(".")
    with named_where_unwritten(file):
        write_atomically(Path(file), lambda new: figure.savefig(new, dpi=120, format=kind))


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
    _save(figure, file)


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
    """Images in rows of ten, each titled with its prediction.

    A right prediction is green; a wrong one is red, with the true class below the image.

    Args:
        images: uint8 [N, C, H, W], C = 1 (grey) or 3; N up to 20.
        labels, predicted: int64 [N].
        classes: the name of each class.
        file: where the PNG goes.
    """
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    cells = figure.subplots(2, 10).flat
    for image, truth, guess, axes in zip(images, labels, predicted, cells, strict=False):
        _show(axes, image)
        axes.set_title(_short(classes[guess]), color=RIGHT if guess == truth else WRONG)
        if guess != truth:
            axes.set_xlabel(f"is {_short(classes[truth])}")
    for axes in list(cells)[len(images) :]:
        axes.set_axis_off()
    _save(figure, file)


def strip(
    images: torch.Tensor,
    labels: torch.Tensor,
    predicted: torch.Tensor,
    classes: list[str],
    file: Path,
) -> None:
    """Images in one row, each titled with its true class over the predicted one.

    Arguments as of :func:`predictions`.
    """
    figure = Figure(figsize=(1.5 * len(images), 2.2), layout="constrained")
    row = figure.subplots(1, len(images), squeeze=False).flat
    for image, truth, guess, axes in zip(images, labels, predicted, row, strict=True):
        _show(axes, image)
        axes.set_title(
            f"{_short(classes[truth])}\n{_short(classes[guess])}",
            color=RIGHT if guess == truth else WRONG,
        )
    _save(figure, file)


def _show(axes, image: torch.Tensor) -> None:
    """A uint8 image [C, H, W] without frame or ticks."""
    axes.set(xticks=[], yticks=[])
    axes.set_frame_on(False)
    axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)


def _short(name: str) -> str:
    return name if len(name) <= 12 else name[:11] + "…"


def confusion(counts: torch.Tensor, classes: list[str], file: Path) -> None:
    """The confusion matrix: a row per true class, a column per predicted one.

    Colour is the share of the row; the numbers are images, and zeros are left out.

    Args:
        counts: int64 [true class, predicted class].
        classes: the name of each class.
        file: where the PNG goes.
    """
    side = 2.2 + 0.46 * len(classes)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    places = range(len(classes))
    axes.set_xticks(places, classes, rotation=90)
    axes.set_yticks(places, classes)
    axes.set(xlabel="predicted", ylabel="true")
    for row, column in counts.nonzero().tolist():
        axes.text(
            column,
            row,
            counts[row, column].item(),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shares[row, column] > 0.5 else "black",
        )
    _save(figure, file)


def class_accuracy(classes: list[ClassFigures], file: Path) -> None:
    """The accuracy of each class against its number of training images, one named dot each."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    shown = sorted((c for c in classes if c.tested), key=lambda c: -c.accuracy)
    places = [(c.trained, c.accuracy) for c in shown]
    axes.plot(*zip(*places, strict=True), "o", color=COLOURS["test"], markersize=4)
    shifts = _label_shifts(places)
    for c, place, down in zip(shown, places, shifts, strict=True):
        options = {"textcoords": "offset points", "size": LABEL_POINTS, "va": "center"}
        axes.annotate(_short(c.name), place, (5, -down), **options)
    axes.set(xlabel="training images of the class", ylabel="test accuracy of the class")
    axes.margins(x=0.12)
    highest, lowest = places[0][1], places[-1][1]
    span = (highest - lowest) or 0.1
    axes.set_ylim(lowest - span * (0.1 + 1.5 * max(shifts) / 280), highest + span * 0.1)
    axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter(import_extra("matplotlib.ticker").PercentFormatter(1))
    _save(figure, file)


LABEL_POINTS = 8


def _label_shifts(places: list[tuple[float, float]]) -> list[float]:
    """How many points down each label must go to lie on no other; ``places`` from the top down.

    Reckoned for axes of 500 by 350 points, of which the dots take four fifths.
    """
    taken, shifts = [], []
    xs, ys = (
        [(value - min(values)) / (max(values) - min(values) or 1) for value in values]
        for values in zip(*places, strict=True)
    )
    for x, y in zip(xs, ys, strict=True):
        x, y = 400 * x, 280 * y
        label = y
        for other_x, other_y in taken:  # from the top down
            near = abs(x - other_x) < 8 * LABEL_POINTS  # a dozen letters
            if near and abs(label - other_y) < 1.2 * LABEL_POINTS:
                label = other_y - 1.2 * LABEL_POINTS
        taken.append((x, label))
        taken.sort(key=lambda place: -place[1])
        shifts.append(y - label)
    return shifts


def guesses(
    photos: list, inputs: torch.Tensor, best: list[list[tuple[str, float]]], file: Path
) -> None:
    """Each photo, what the model got of it, and bars of its likeliest classes.

    Args:
        photos: N images of Pillow.
        inputs: uint8 [N, C, H, W], C = 1 (grey) or 3.
        best: per photo, (class, probability) from the likeliest down.
        file: where the PNG goes.
    """
    figure = Figure(figsize=(10.5, 2.6 * len(photos) + 0.2), layout="constrained")
    rows = figure.subplots(len(photos), 3, squeeze=False, width_ratios=[1, 1, 1.6])
    for axes, title in zip(rows[0], ("image", "input of the model"), strict=False):
        axes.set_title(title)
    for (left, middle, right), photo, image, classes in zip(
        rows, photos, inputs, best, strict=True
    ):
        left.imshow(photo.convert("RGB"))
        left.set(xticks=[], yticks=[])
        _show(middle, image)
        for axes in (left, middle):  # a frame shows where white paper ends
            axes.set_frame_on(True)
            axes.spines[:].set_color("lightgray")
        names, values = zip(*classes, strict=True)
        places = range(len(names))
        bars = right.barh(places, values, color=COLOURS["train"])
        right.bar_label(bars, [f"{value:.1%}" for value in values], padding=3)
        right.set_yticks(places, names)
        right.invert_yaxis()
        right.set(xlim=(0, 1.15), xticks=[0, 0.25, 0.5, 0.75, 1])
        right.xaxis.set_major_formatter(import_extra("matplotlib.ticker").PercentFormatter(1))
        right.spines[["top", "right"]].set_visible(False)
    _save(figure, file)


def filters(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Each filter [h, w] as a grid of grey cells with their values written in them."""
    figure = Figure(figsize=(3.2 * len(weights), 3.5), layout="constrained")
    for axes, (name, weight) in zip(figure.subplots(1, len(weights)), weights.items(), strict=True):
        axes.imshow(weight.numpy(), cmap="gray")
        axes.set(title=name, xticks=[], yticks=[])
        middle = (weight.min() + weight.max()).item() / 2
        for row, values in enumerate(weight.tolist()):
            for column, value in enumerate(values):
                colour = "black" if value > middle else "white"
                text = str(Fraction(value)) if value % 1 else f"{value:.0f}"
                axes.text(column, row, text, color=colour, ha="center", va="center")
    _save(figure, file)


def maps(images: dict[str, torch.Tensor], file: Path) -> None:
    """Maps [h, w] side by side, each in its own range of greys, three in a row."""
    rows = -(-len(images) // 3)
    height, width = next(iter(images.values())).shape
    figure = Figure(figsize=(15, rows * (5 * height / width + 0.4)), layout="constrained")
    cells = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axes in cells:
        axes.set_axis_off()
    for axes, (name, image) in zip(cells, images.items(), strict=False):
        low, high = _range([image])
        axes.imshow(image.numpy(), cmap="gray", vmin=low, vmax=high)
        axes.set_title(name)
    _save(figure, file)


def stages(maps: dict[str, torch.Tensor], channels: list[str], file: Path) -> None:
    """A row per channel and a column per stage of maps [channels, h, w].

    All maps share one range of greys, so that what ReLU cuts off shows.
    """
    height, width = next(iter(maps.values())).shape[1:]
    low, high = _range(list(maps.values()))
    size = (1.3 + 4.2 * len(maps), len(channels) * (3.7 * height / width + 0.1))
    # "constrained" cuts the names of the rows off.
    figure = Figure(figsize=size, layout="compressed")
    cells = figure.subplots(len(channels), len(maps), squeeze=False)
    for column, (stage, images) in enumerate(maps.items()):
        for row, channel in enumerate(channels):
            axes = cells[row][column]
            shown = axes.imshow(images[row].numpy(), cmap="gray", vmin=low, vmax=high)
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"{stage}, {images.shape[2]} x {images.shape[1]}")
            if column == 0:
                axes.set_ylabel(channel, rotation=0, ha="right", va="center")
    figure.colorbar(shown, ax=cells, shrink=0.5)
    _save(figure, file)


def _range(maps: list[torch.Tensor]) -> tuple[float, float]:
    """The range of all but the brightest and darkest 1 %, which would leave the rest grey.

    In a drawing that 1 % may be all there is beside the paper, and then it counts.
    """
    values = torch.cat([m.flatten() for m in maps])
    paper, bounds = values.median(), []
    for share, end in ((0.01, values.min()), (0.99, values.max())):
        bound = values.kthvalue(max(1, round(share * len(values)))).values
        only_paper = (bound - paper).abs() <= 0.01 * (end - paper).abs()  # rounding tints paper
        bounds.append((end if only_paper else bound).item())
    return tuple(bounds)


def comparison(losses: dict[str, list[float]], ratios: list[list[float]], file: Path) -> None:
    """The loss curves of both kinds of layers, and the time ratio in each epoch.

    Args:
        losses: per kind of layers, the loss of each step of one seed.
        ratios: per seed, native time / fused time in each epoch.
        file: where the PNG goes.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    # The native curve is wide, so that it shows where the fused one covers it.
    styles = {
        "native": {"color": "tab:gray", "linewidth": 2.5},
        "fused": {"color": "tab:blue", "linewidth": 0.8},
    }
    for name, values in losses.items():
        left.plot(
            range(1, len(values) + 1), values, **{"linewidth": 0.8} | styles[name], label=name
        )
    left.set(xlabel="step", ylabel="training loss")
    left.set_ylim(bottom=0)
    left.legend()
    for seed in ratios:
        right.plot(range(1, len(seed) + 1), seed, "o-", color="tab:blue", alpha=0.6)
    right.axhline(1, color="black", linewidth=0.8)
    right.set(xlabel="epoch", ylabel="native time / fused time")
    right.set_ylim(bottom=0)
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save(figure, file)
