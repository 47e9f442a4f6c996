"""The benchmark rows as a picture: one panel per machine, one dot per row, a bar at each mean."""

import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

OURS, SLOWER = "tab:blue", "tab:red"
WIDTH, ROW_HEIGHT, PANEL_HEIGHT = 11, 0.22, 0.7  # inches
COLUMNS, DPI = 2, 110
TICKS = (0.5, 1, 2, 4, 8, 16)


def draw(panels: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Ratios on a logarithmic axis; what is left of 1 is slower than PyTorch, and red.

    Args:
        panels: {machine: {group: the ratios of its rows}}
        file: where the PNG goes.
    """
    lines = [list(panels.items())[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    counts = [max(len(groups) for _, groups in line) for line in lines]
    heights = [PANEL_HEIGHT + ROW_HEIGHT * count for count in counts]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    cells = figure.subplots(len(lines), COLUMNS, squeeze=False, height_ratios=heights, sharex=True)
    for line, count, row in zip(lines, counts, cells, strict=True):
        for axes in row[len(line) :]:
            axes.set_axis_off()
        for (machine, groups), axes in zip(line, row, strict=False):
            _panel(axes, machine, groups)
            axes.set_ylim(count - 0.5, -0.5)
    figure.savefig(file, dpi=DPI)


def _panel(axes, machine, groups):
    for y, ratios in enumerate(groups.values()):
        mean = statistics.geometric_mean(ratios)
        axes.barh(y, mean - 1, left=1, height=0.7, color=OURS, alpha=0.25, linewidth=0)
        colours = [SLOWER if ratio < 1 else OURS for ratio in ratios]
        axes.scatter(ratios, [y] * len(ratios), s=9, c=colours, linewidths=0)
        axes.text(1.01, y, f"{mean:.2f}×", transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{t:g}×" for t in TICKS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(labelbottom=True)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(machine, fontsize="small", loc="right")
