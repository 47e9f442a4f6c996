"""Keeps the figures of finished runs, and writes them into docs/recipes.md.

`python bench/recipe_report.py RUN...` takes folders of `fastcls train` and `fastcls
compare`; without an argument the document is written anew from docs/recipes.json.
"""

import json
import os
import sys
from pathlib import Path

import roofline
from report import ROOT, write_between_markers

from fastcls import build_info, recipes
from fastcls.compare import mean_and_spread, ratio
from fastcls.files import read_records
from fastcls.runs import RunFolder

FILE = ROOT / "docs" / "recipes.json"
DOCUMENT = ROOT / "docs" / "recipes.md"

# What the write-ups report, by epoch.
REPORTED = {
    "mnist-cnn": {
        "loss of the last batch": dict(
            enumerate([2.072, 0.757, 0.601, 0.433, 0.512, 0.447, 0.388, 0.402, 0.423, 0.329], 1)
        )
    },
    "mnist-mlp": {"training loss": {1: 0.9506, 5: 0.2031, 10: 0.1224, 20: 0.0683, 30: 0.0471}},
    "fashion-softmax": {
        "training loss": dict(enumerate([0.7874, 0.5712, 0.5250, 0.5018, 0.4860], 1)),
        "training accuracy": dict(enumerate([0.749, 0.812, 0.826, 0.833, 0.837], 1)),
        "test accuracy": dict(enumerate([0.791, 0.813, 0.820, 0.824, 0.827], 1)),
    },
    "cifar-cnn": {"test accuracy": {8: 0.70}},
}
FIGURES = {
    "loss of the last batch": "last_batch_loss",
    "training loss": "train_loss",
    "training accuracy": "train_accuracy",
    "validation loss": "val_loss",
    "test accuracy": "test_accuracy",
    "seconds": "seconds",
}


# ------------------------------------------------------------------------------ runs and the file


def machine() -> dict:
    info = build_info()
    return {
        "cpu": roofline.cpu_model(),
        "cores": os.cpu_count(),
        **{name: info[name] for name in ("cpu_isa", "torch", "devices")},
    }


def read_run(path: Path) -> dict:
    """What of a finished run goes into the file."""
    if (path / "compare.json").exists():
        found = json.loads((path / "compare.json").read_text())
        return {
            "kind": "compare",
            "recipe": found["recipe"],
            "settings": changed(found["recipe"], found["config"]),
            "threads": found["machine"]["threads"],
            "channels_last": found["channels_last"],
            "seeds": found["seeds"],
            "machine": machine(),
        }
    folder = RunFolder(path)
    config = folder.read_config()
    recipe, epochs = config.pop("recipe"), read_records(folder.metrics)
    losses = [record["loss"] for record in read_records(folder.steps)]
    per_epoch = len(losses) // len(epochs)
    for epoch in epochs:
        epoch["last_batch_loss"] = losses[epoch["epoch"] * per_epoch - 1]
    summary = json.loads(folder.summary.read_text())
    return {
        "kind": "train",
        "recipe": recipe,
        "settings": changed(recipe, config),
        "epochs": epochs,
        "summary": {name: value for name, value in summary.items() if name != "classes"},
        "machine": machine(),
    }


def changed(recipe: str, config: dict) -> dict:
    """The settings that are not the recipe's own; of a file its name, not where it lay."""
    defaults = vars(recipes.get(recipe).Config())
    settings = {name: value for name, value in config.items() if defaults[name] != value}
    if "weights" in settings:
        settings["weights"] = Path(settings["weights"]).name
    return settings


def keep(runs: list[dict]) -> list[dict]:
    """Put the runs into the file, each in the place of an older one of the same settings."""

    def key(run):
        return run["kind"], run["recipe"], sorted(run["settings"].items())

    old = json.loads(FILE.read_text()) if FILE.exists() else []
    new = [run for run in old if key(run) not in map(key, runs)] + runs
    new.sort(key=lambda run: str(key(run)))
    FILE.write_text("[\n" + ",\n".join(json.dumps(run) for run in new) + "\n]\n")
    return new


# ------------------------------------------------------------------------------------ the document


def train_section(runs: list[dict]) -> list[str]:
    """The runs of one recipe, each with a table of its epochs beside the reported figures."""
    lines = []
    for run in runs:
        recipe, epochs = run["recipe"], run["epochs"]
        reported = REPORTED.get(recipe, {})
        shown = [e for e in epochs if len(epochs) <= 10 or e["epoch"] in (1, 5, 8, 10, 20, 30)]
        shown += [epochs[-1]] if epochs[-1] not in shown else []
        names = [n for n in FIGURES if n in reported or n in ("test accuracy", "seconds")]
        names.append("training loss") if "training loss" not in names else None
        lines += [f"`fastcls train {command(run)}`:", ""]
        lines += table(["epoch", *(str(e["epoch"]) for e in shown)])
        for name in sorted(names, key=list(FIGURES).index):
            if name in reported:
                cells = (reported[name].get(e["epoch"]) for e in shown)
                lines.append(row([f"{name}, reported", *(cell(name, c) for c in cells)]))
            cells = (e.get(FIGURES[name]) for e in shown)
            lines.append(row([name, *(cell(name, c) for c in cells)]))
        lines += ["", conclusion(run), ""]
    return lines


def command(run: dict) -> str:
    options = []
    for name, value in run["settings"].items():
        name = f"--{name.replace('_', '-')}"
        options.append(name if value is True else f"{name} {value}")
    return " ".join([run["recipe"], *options])


def has_seed_0(run: dict, runs: list[dict]) -> bool:
    """Whether there is a run of the recipe's own seed and otherwise the same settings."""
    return any(r["settings"] == without_seed(run) for r in runs)


def without_seed(run: dict) -> dict:
    return {name: value for name, value in run["settings"].items() if name != "seed"}


def conclusion(run: dict) -> str:
    summary = run["summary"]
    text = f"Best model, of epoch {summary['best_epoch']}: test loss {summary['test_loss']:.4f}, "
    text += f"accuracy {summary['test_accuracy']:.2%}"
    if "test_top5" in summary:
        text += f", top-5 {summary['test_top5']:.2%}"
    return f"{text}. {where(run)}"


def where(run: dict) -> str:
    m = run["machine"]
    return f"{m['cpu']}, {m['cores']} cores, {m['cpu_isa']}, torch {m['torch']}."


def seeds_section(runs: list[dict]) -> list[str]:
    """Runs that differ in their seeds alone, as means and spreads."""
    accuracies = mean_and_spread([run["epochs"][-1]["test_accuracy"] for run in runs])
    name = command({**runs[0], "settings": without_seed(runs[0])})
    return [
        f"`fastcls train {name}`, {len(runs)} seeds: test accuracy after the last epoch "
        f"{accuracies[0]:.2%} ± {accuracies[1]:.2%}.",
        "",
    ]


def compare_section(runs: list[dict]) -> list[str]:
    head = ["compare", "seeds", "native accuracy", "fused accuracy", "native s", "fused s"]
    lines = table([*head, "time ratio", "with evaluation", "machine"])
    for run in runs:
        rows = run["seeds"]
        both = [[r[side] for r in rows] for side in ("native", "fused")]
        accuracies = (mean_and_spread([r["test_accuracy"] for r in side]) for side in both)
        seconds = (mean_and_spread([r["seconds"] for r in side])[0] for side in both)
        ratios = (mean_and_spread([ratio(r, evaluation) for r in rows]) for evaluation in (0, 1))
        cells = [f"{command(run)} --threads {run['threads']}", str(len(rows))]
        cells += [f"{mean:.2%} ± {spread:.2%}" for mean, spread in accuracies]
        cells += [f"{s:.1f}" for s in seconds]
        cells += [f"{mean:.2f} ± {spread:.2f}" for mean, spread in ratios]
        lines.append(row([*cells, where(run).rstrip(".")]))
    return [*lines, ""]


def cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name.endswith("accuracy"):
        return f"{value:.1%}"
    return f"{value:.1f}" if name == "seconds" else f"{value:.3f}"


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: list[str]) -> list[str]:
    return [row(head), row(["---", *["--:"] * (len(head) - 1)])]


def speed_section(runs: list[dict]) -> list[str]:
    columns = {"test_accuracy": "test accuracy", "processor_seconds": "processor s"}
    head = ["mnist-speed, threads", "seeds", *columns.values(), "wall clock s", "machine"]
    lines = table(head)
    for run in runs:
        rows = run["seeds"]
        cells = [str(run["settings"]["threads"]), str(len(rows))]
        for name in (*columns, "seconds"):
            mean, spread = mean_and_spread([r[name] for r in rows])
            form = ".2%" if name == "test_accuracy" else ".1f"
            cells.append(f"{mean:{form}} ± {spread:{form}}")
        lines.append(row([*cells, where(run).rstrip(".")]))
    return [*lines, ""]


def document(runs: list[dict]) -> list[str]:
    lines = []
    for recipe in sorted({run["recipe"] for run in runs if run["kind"] == "train"}):
        mine = [r for r in runs if r["kind"] == "train" and r["recipe"] == recipe]
        lines += [f"### {recipe}", ""]
        lines += train_section(
            [r for r in mine if "seed" not in r["settings"] or not has_seed_0(r, mine)]
        )
        for run in mine:
            alike = [r for r in mine if without_seed(r) == without_seed(run)]
            if len(alike) > 1 and run is alike[0]:
                lines += seeds_section(alike)
    if speed := [run for run in runs if run["kind"] == "speed"]:
        lines += ["### mnist-speed", "", *speed_section(speed)]
    if compared := [run for run in runs if run["kind"] == "compare"]:
        lines += ["### Native and fused side by side", "", *compare_section(compared)]
    return lines


def main():
    runs = keep([read_run(Path(path)) for path in sys.argv[1:]])
    write_between_markers(DOCUMENT, document(runs))


if __name__ == "__main__":
    main()
