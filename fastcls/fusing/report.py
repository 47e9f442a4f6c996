"""What ``fuse`` did or would do, as rows and as a table."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One chain.

    ``where`` is the name of its first module in the model, ``chain`` its steps: modules by their
    class, functions in lower case. ``reason`` says why it was not fused; of a fused chain, why a
    step that could have followed was left out, or that a batch norm lets it gain in evaluation
    alone.
    """

    where: str
    chain: str
    fused: bool
    reason: str


class FusionReport:
    """The chains of a model, fused or not, in the order of the model; prints as a table.

    Attributes:
        rows: a ``Row`` for each chain; iterating and ``len`` go over them.
        notes: modules whose ``forward`` could not be traced, and why.
    """

    def __init__(self, rows: Sequence[Row], notes: Sequence[str] = ()):
        self.rows = tuple(rows)
        self.notes = tuple(notes)

    @property
    def fused(self) -> tuple[Row, ...]:
        """The rows of the fused chains."""
        return tuple(row for row in self.rows if row.fused)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("module", "chain", "fused", "reason")]
        cells += [(r.where, r.chain, "yes" if r.fused else "no", r.reason) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"{len(self.fused)} of {len(self)} chains fused")
        return "\n".join(line.rstrip() for line in [*lines, *self.notes])

    __repr__ = __str__
