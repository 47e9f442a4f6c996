"""Tables of the benchmark rows: in the terminal, in the README and in docs/benchmarks.md.

`python bench/report.py` rewrites both documents between their markers from bench/results/*.json,
and the picture that the README shows.
"""

import json
import re
import statistics
from pathlib import Path

import roofline

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PICTURE = ROOT / "docs" / "benchmarks.png"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# A row measured again replaces the old one when these are equal.
KEY = ["op", "case", "mode", "dtype", "batch", "threads", "isa", "torch_isa"]
README_BATCH = 512
NONE = "–"  # in a cell without a value


# ------------------------------------------------------------------------------ rows and files


def machine_file():
    """bench/results/<processor or GPU>-<cores>-cores.json"""
    name = f"{roofline.device_name()} {roofline.cores()} cores"
    return RESULTS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def keep(row, path):
    """Puts the row into the file, in the place of an older one of the same key."""
    path = Path(path)
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [r for r in rows if [r[k] for k in KEY] != [row[k] for k in KEY]] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")


def has(row, path):
    """Is the row in the file, as far as its key is known before it is measured?"""
    path = Path(path)
    known = [k for k in KEY if k in row]
    rows = json.loads(path.read_text()) if path.exists() else []
    return any(all(r[k] == row[k] for k in known) for r in rows)


def median(row, side):
    return row["seconds"][side][1]


def peers(row):
    return [side for side in row["seconds"] if not side.startswith("fused")]


def ours(row):
    """Our side that counts: NCHW on a CPU, the fastest on CUDA, where each has a peer like it."""
    sides = [side for side in row["seconds"] if side.startswith("fused")]
    if "fused" in sides and row["isa"] != "CUDA":
        return "fused"
    return min(sides, key=lambda side: median(row, side))


def ratio(row, side):
    """How many times faster than the best peer; None where nothing was compared."""
    if not peers(row) or side not in row["seconds"]:
        return None
    return min(median(row, p) for p in peers(row)) / median(row, side)


# -------------------------------------------------------------------------------------- tables


def _milliseconds(row, side):
    return f"{median(row, side) * 1e3:.3g}" if side in row["seconds"] else NONE


def _spread(row):
    """Half the distance of the quartiles of our time, relative to the median."""
    low, middle, high = row["seconds"][ours(row)]
    return f"±{(high - low) / 2 / middle:.0%}"


def _times(value):
    return NONE if value is None else f"{value:.2f}"


def _rate(row, amount, peak):
    """Giga-units per second and the share of the machine's measured peak."""
    if amount not in row:
        return [NONE, NONE]
    rate = row[amount] / median(row, ours(row))
    return [f"{rate / 1e9:.1f}", f"{rate / row[peak]:.0%}"]


def _memory(row):
    peaks = row.get("peak_memory", {})
    return [f"{peaks[s] / 2**20:.0f}" if s in peaks else NONE for s in ("fused", "eager")]


def _first_ratio(row, sides):
    return next((r for r in (ratio(row, side) for side in sides) if r), None)


def _accuracy(row):
    """Mean and standard deviation over the seeds of our best side."""
    if "test_accuracy" not in row:
        return NONE
    mean, spread = row["test_accuracy"][ours(row)]
    return f"{mean:.2%} ± {spread:.2%}"


SIDES = [
    *["fused", "fused-cl", "fused-graph", "fused-graph-cl"],
    *["eager", "eager-cl", "eager-graph", "eager-graph-cl"],
    *["compile", "compile-cl", "compile-graph", "compile-graph-cl", "compile-max-graph-cl"],
    *["liger", "quack", "quack-graph", "loader-eager"],
]
RATIOS = {
    "ratio": ["fused"],
    "ratio cl": ["fused-cl"],
    "ratio graph": ["fused-graph-cl", "fused-graph"],
}
HEAD = [
    *["op", "case", "mode", "dtype", "batch", "threads"],
    *["MB", "GFLOP"],
    *[f"{side} ms" for side in SIDES],
    *["spread", *RATIOS],
    *["GFLOP/s", "of peak", "GB/s", "of copy"],
    *["fused MiB", "eager MiB"],
    *["accuracy", "syncs"],
]


def _cells(row):
    return [
        *(str(row[k]) for k in ("op", "case", "mode", "dtype", "batch", "threads")),
        *(
            f"{row[k] / unit:.3g}" if k in row else NONE
            for k, unit in (("bytes", 1e6), ("flops", 1e9))
        ),
        *(_milliseconds(row, side) for side in SIDES),
        *[_spread(row), *(_times(_first_ratio(row, sides)) for sides in RATIOS.values())],
        *_rate(row, "flops", "peak_flops"),
        *_rate(row, "bytes", "copy_bytes"),
        *_memory(row),
        _accuracy(row),
        NONE if row.get("syncs_per_step") is None else f"{row['syncs_per_step']:g}",
    ]


def _without_empty_columns(table):
    used = [any(cell != NONE for cell in column[1:]) for column in zip(*table, strict=True)]
    return [[c for c, keep in zip(line, used, strict=True) if keep] for line in table]


def _aligned(table, separator):
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        separator.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in table
    ]


def groups(rows):
    """{(op, mode, dtype, batch, threads): rows}; a row with its own batch counts at every batch."""
    found = {}
    for row in rows:
        same = [r for r in rows if all(r[k] == row[k] for k in ("op", "mode", "dtype", "threads"))]
        batches = sorted({r["batch"] for r in same if not r["own_batch"]}) or ["own"]
        for batch in batches if row["own_batch"] else [row["batch"]]:
            key = (row["op"], row["mode"], row["dtype"], str(batch), str(row["threads"]))
            found.setdefault(key, []).append(row)
    return found


def group_ratios(rows):
    """{key of a group: how many times faster than the best peer each of its rows is}"""
    found = {
        key: [r for r in (ratio(row, ours(row)) for row in group) if r]
        for key, group in groups(rows).items()
    }
    return {key: ratios for key, ratios in found.items() if ratios}


def _summary(rows):
    """The geometric mean of each group's ratios, with the ratios of its slowest and fastest row."""
    for key, ratios in group_ratios(rows).items():
        means = (f"{f(ratios):.2f}" for f in (statistics.geometric_mean, min, max))
        yield [*key, str(len(ratios)), *means]


SUMMARY_HEAD = [
    *["op", "mode", "dtype", "batch", "threads"],
    *["rows", "geometric mean", "slowest", "fastest"],
]


def text(rows):
    """All rows and their geometric means, for the terminal."""
    lines = _aligned(_without_empty_columns([HEAD, *map(_cells, rows)]), "  ")
    summary = list(_summary(rows))
    if summary:
        lines += ["", "times faster than the best peer:"]
        lines += _aligned([SUMMARY_HEAD, *summary], "  ")
    return "\n".join(lines)


def _markdown(table):
    head, *body = table
    rule = ["---" if i == 0 else "--:" for i in range(len(head))]
    return [f"| {' | '.join(line)} |" for line in (head, rule, *body)]


# ----------------------------------------------------------------------------------- documents


def _machine(row):
    isa = f"fastcls on {row['isa']}, PyTorch on {row['torch_isa']}"
    return f"{row['cpu']}, {row['cores']} cores; {isa}; torch {row['torch']}"


def _machines(rows):
    found = {}
    for row in sorted(rows, key=_machine):
        found.setdefault(_machine(row), []).append(row)
    return found


def _of_readme(rows):
    return [r for r in rows if r["own_batch"] or r["batch"] == README_BATCH]


def readme_block(rows):
    """A picture of all rows at one batch size, and their geometric means."""
    lines = [
        f"![How many times faster, by machine and kind of row]({PICTURE.relative_to(ROOT)})",
        "",
        f"A dot is a row, a bar their geometric mean; batch {README_BATCH}, or one of the row's",
        "own; all threads; red is slower than the best peer.",
        "",
        "<details><summary>The means as tables, one thread too</summary>",
        "",
    ]
    for machine, group in _machines(_of_readme(rows)).items():
        lines += [f"{machine}:", "", *_markdown([SUMMARY_HEAD, *_summary(group)]), ""]
    return [*lines, "</details>", ""]


def picture_panels(rows):
    """{machine: {kind of row: ratios}} at one batch size and with as many threads as there are."""
    panels = {}
    for group in _machines(_of_readme(rows)).values():
        row = group[0]
        panel = panels.setdefault(f"{row['cpu']}, {row['cores']} cores; torch {row['torch']}", {})
        by_kind = sorted(
            group_ratios(group).items(), key=lambda item: (item[0][:3], int(item[0][4]))
        )
        for (*kind, _, _), ratios in by_kind:
            panel[f"{' '.join(kind)}, {row['isa']}"] = ratios  # of more threads than before
    return panels


def docs_block(rows):
    lines = []
    for machine, group in _machines(rows).items():
        dates = sorted({r["date"] for r in group})
        table = _without_empty_columns([HEAD, *map(_cells, group)])
        lines += [
            f"### {machine}",
            "",
            f"Measured {' to '.join(dates[:: max(1, len(dates) - 1)])}.",
        ]
        lines += ["", *_markdown([SUMMARY_HEAD, *_summary(group)])]
        lines += ["", *_markdown(table), ""]
    return lines


def write_between_markers(path, lines):
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    path.write_text("\n".join([before + BEGIN, *lines, END + after]))


def main():
    rows = [row for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text())]
    if not rows:
        raise SystemExit(f"no rows in {RESULTS}: run pytest bench/ --benchmark --json auto")
    print(text(rows))
    write_between_markers(ROOT / "README.md", readme_block(rows))
    write_between_markers(ROOT / "docs" / "benchmarks.md", docs_block(rows))
    import picture  # matplotlib, which the measurements themselves do not need

    picture.draw(picture_panels(rows), PICTURE)


if __name__ == "__main__":
    main()
