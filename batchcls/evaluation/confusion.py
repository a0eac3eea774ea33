"""Which category is taken for which: counts of (label, answer) pairs, dense for few categories, else sparse."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batchcls.evaluation.outcomes import Categories, Outcomes, Rows

DENSE_CATEGORIES = 200
"""Up to so many categories every pair has a row, that of none included."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Pairs of categories, by number, and how many rows each has; ascending by label, then by answer."""

    labels: tuple[str, ...]
    truth: Categories
    predicted: Categories
    rows: Rows

    @classmethod
    def of(cls, outcomes: Outcomes) -> "Confusion":
        """Count N rows; memory follows the pairs that occur."""
        table = pa.table({"truth": outcomes.truth, "predicted": outcomes.predicted})
        found = table.group_by(["truth", "predicted"]).aggregate([([], "count_all")])
        found = found.sort_by([("truth", "ascending"), ("predicted", "ascending")])
        columns = (found.column(name).to_numpy() for name in ("truth", "predicted", "count_all"))
        return cls(outcomes.labels, *columns)

    def as_table(self) -> pa.Table:
        """Columns label, predicted, rows, and share_of_label in 0..1; see DENSE_CATEGORIES."""
        support = np.bincount(self.truth, weights=self.rows, minlength=len(self.labels))
        truth, predicted, rows = self.truth, self.predicted, self.rows
        if len(self.labels) <= DENSE_CATEGORIES:
            rows = self.matrix().reshape(-1)
            index = np.arange(len(self.labels), dtype=np.int32)
            truth, predicted = np.repeat(index, len(index)), np.tile(index, len(index))
        names = pa.array(self.labels, pa.string())
        whole = support[truth]
        share = np.divide(rows, whole, out=np.zeros(len(rows)), where=whole > 0)
        return pa.table(
            {
                "label": names.take(pa.array(truth)),
                "predicted": names.take(pa.array(predicted)),
                "rows": pa.array(rows, pa.int64()),
                "share_of_label": pa.array(share, pa.float64()),
            }
        )

    def matrix(self) -> Rows:
        """Rows by label and answer, K x K; for few categories."""
        dense = np.zeros((len(self.labels),) * 2, np.int64)
        dense[self.truth, self.predicted] = self.rows
        return dense

    def worst(self, count: int) -> list[tuple[int, int, int]]:
        """The pairs that are mixed up most often: label, answer, rows; most rows first."""
        wrong = np.flatnonzero(self.truth != self.predicted)
        order = wrong[np.argsort(-self.rows[wrong], kind="stable")[:count]]
        return [(int(self.truth[i]), int(self.predicted[i]), int(self.rows[i])) for i in order]
