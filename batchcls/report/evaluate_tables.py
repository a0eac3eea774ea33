"""The tables of an evaluation's page: categories, the confusion of a few, the tree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchcls.comparison.recommend import percent
from batchcls.evaluation.evaluated import Evaluated, Hierarchy
from batchcls.evaluation.hierarchy import PathScores
from batchcls.evaluation.tables import categories_table
from batchcls.report.tables import Column, Table, make_table

_NONE = "\N{EN DASH}"
_WHOLE, _ENDS, _MATRIX = 100, 50, 20

_Category = Mapping[str, Any]

_COLUMNS: Sequence[Column[_Category]] = (
    Column("F1", lambda row: _share(row["f1"])),
    Column("precision", lambda row: _share(row["precision"])),
    Column("recall", lambda row: _share(row["recall"])),
    Column("support", lambda row: f"{row['support']:,}", "rows"),
    Column("answered", lambda row: f"{row['answered']:,}", "rows"),
    Column("threshold", lambda row: "never" if row["threshold"] is None else f"{row['threshold']:.3f}"),
    Column("own share", lambda row: _share(row["own_weight"]), "of the threshold"),
    Column("accepted", lambda row: f"{row['held_out_accepted']:,}", "held-out rows"),
    Column("of these right", lambda row: _share(row["held_out_precision"])),
)


@dataclass(frozen=True, slots=True)
class Cell:
    """Rows of a pair of categories, and how strongly it is shaded: percent of the label's rows."""

    rows: str
    shade: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """Confusion of a few categories: a row a label, a column an answer."""

    labels: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def category_tables(found: Evaluated) -> tuple[Table, ...]:
    """All categories, the worst first; of many the 50 worst and the 50 best, by F1.

    A category without rows and answers has no F1 and stands last.
    """
    table = categories_table(found)
    f1 = table.column("f1").to_numpy()
    order = np.argsort(np.where(np.isnan(f1), np.inf, f1), kind="stable")
    if len(order) <= _WHOLE:
        return (_table("Categories, the worst first", table.take(order).to_pylist()),)
    known = order[: int(np.isfinite(f1).sum())]
    worst, best = known[:_ENDS], known[::-1][:_ENDS]
    return (
        _table(f"The {len(worst)} worst of {len(order):,} categories", table.take(worst).to_pylist()),
        _table(f"The {len(best)} best of {len(order):,} categories", table.take(best).to_pylist()),
    )


def matrix_of(found: Evaluated) -> Matrix | None:
    """The confusion of all categories, if they are few enough to be looked at."""
    labels = found.outcomes.labels
    if len(labels) > _MATRIX:
        return None
    counts = found.confusion.matrix()
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    return Matrix(
        labels,
        tuple(
            tuple(
                Cell(f"{rows:,}" if rows else "", round(100 * share))
                for rows, share in zip(line.tolist(), part.tolist(), strict=True)
            )
            for line, part in zip(counts, shares, strict=True)
        ),
    )


def hierarchy_table(found: Hierarchy) -> Table:
    """Precision and recall over the nodes of the tree, with and without abstaining."""
    entries = [("best label", "of every row", found.flat)]
    if found.deepest is not None and found.named is not None:
        entries.append(
            ("deepest sure node", f"{percent(found.named)} of the rows have one; held-out", found.deepest)
        )
    columns: Sequence[Column[tuple[str, str, PathScores]]] = (
        Column("precision", lambda entry: _share(entry[2].precision)),
        Column("recall", lambda entry: percent(entry[2].recall)),
        Column("F1", lambda entry: percent(entry[2].f1)),
    )
    return make_table(
        "In the tree of categories", columns, entries, lambda entry: (entry[0], entry[1]), lambda _: False
    )


def _table(caption: str, rows: Sequence[_Category]) -> Table:
    return make_table(
        caption, _COLUMNS, rows, lambda row: (row["label"], row["category_path"] or ""), lambda _: False
    )


def _share(value: float | None) -> str:
    return _NONE if value is None else percent(value)
