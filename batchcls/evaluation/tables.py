"""What was found as Arrow tables; the contract with those who read an evaluation's Parquet files."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.evaluation.evaluated import Evaluated
from batchcls.evaluation.metrics import CategoryCounts
from batchcls.evaluation.outcomes import Outcomes, Rows
from batchcls.evaluation.reliability import Bin, reliability
from batchcls.evaluation.thresholds import NEVER


def categories_table(found: Evaluated) -> pa.Table:
    """One row a category: how right its answers are, its threshold, and what that is worth on held-out rows.

    A share that would divide by zero is null, and so is the threshold of a category that is never sure enough.
    """
    outcomes, held, limits = found.outcomes, found.held_out, found.thresholds
    counts = CategoryCounts.of(outcomes)
    categories = len(outcomes.labels)
    taken = held.outcomes.take(np.flatnonzero(held.accepted))
    accepted = CategoryCounts.of(taken) if len(taken) else None
    zeros = np.zeros(categories, np.int64)
    paths = [None] * categories if found.paths is None else ["/".join(path) for path in found.paths]
    return pa.table(
        {
            "label": pa.array(outcomes.labels, pa.string()),
            "category_path": pa.array(paths, pa.string()),
            "support": counts.support,
            "answered": counts.answered,
            "right": counts.right,
            "precision": _shares(counts.precision),
            "recall": _shares(counts.recall),
            "f1": _shares(counts.f1),
            "threshold": pa.array(limits.by_category, mask=limits.by_category == NEVER),
            "own_weight": pa.array(limits.own_weight, pa.float32()),
            "held_out_accepted": accepted.answered if accepted else zeros,
            "held_out_precision": _shares(accepted.precision if accepted else np.full(categories, np.nan)),
        }
    )


def reliability_table(found: Evaluated) -> pa.Table:
    """The bins before the temperature and, where there is one, after it, fitted on the other half of the rows."""
    kinds = {"before": found.before} | ({"held_out": found.held_out.outcomes} if found.temperature else {})
    rows = [
        {"kind": kind, **{name: getattr(bin_, name) for name in Bin.__slots__}}
        for kind, outcomes in kinds.items()
        for bin_ in bins_of(outcomes)
    ]
    return pa.Table.from_pylist(rows)


def bins_of(outcomes: Outcomes) -> tuple[Bin, ...]:
    """The reliability of outcomes."""
    return reliability(outcomes.probability, outcomes.right)


def predictions_table(found: Evaluated, notes: pa.Table, rows: Rows) -> pa.Table:
    """Every row of the manifest: `labelled.NOTES`, and for judged ones the answer as `classify` would give it.

    Args:
        found: of the judged rows.
        notes: of all rows.
        rows: numbers of the judged ones, ascending.
    """
    outcomes = found.outcomes
    places = np.full(notes.num_rows, -1, np.int64)
    places[rows] = np.arange(len(rows))
    taken = pa.array(places, mask=places < 0)
    labels = pa.array(outcomes.labels, pa.string())
    answers = {
        "predicted": labels.take(pa.array(outcomes.predicted)),
        "probability": pa.array(outcomes.probability),
        "right": pa.array(outcomes.right),
        "rank": pa.array(outcomes.rank, mask=outcomes.rank < 0),
        "accepted": pa.array(found.accepted),
    }
    if found.hierarchy is not None and found.hierarchy.place is not None:
        place = found.hierarchy.place
        names = pa.array(found.hierarchy.names, pa.string())
        answers["category_path"] = names.take(pa.array(place, mask=place < 0))
    for name, column in answers.items():
        notes = notes.append_column(name, column.take(taken))
    return notes


def _shares(values: npt.NDArray[np.float64]) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))
