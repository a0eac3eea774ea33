"""The result of evaluating a cascade against its networks, as the document cascade.json, and its table of rows."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from batchcls.comparison.measurement import cost_of_million
from batchcls.evaluation.cascade_thresholds import (
    FittedCascade,
    PairedDifference,
    PairedRows,
    fit_cascade,
    keeps_held_out,
)
from batchcls.evaluation.classification_metrics import Outcomes, Rows
from batchcls.evaluation.correctness import Flags
from batchcls.models.cascade_record import CascadeThresholds
from batchcls.schema import LARGE, SMALL
from batchcls.storage.documents import Count, Document, StoredRecord, UtcTime


class CascadeNetwork(StoredRecord):
    """One of the networks of a cascade."""

    bundle: str = Field(description="URI of the bundle, without credentials.")
    fingerprint: str = Field(
        description="Fingerprint of the bundle; of the small one, without an earlier cascade."
    )
    architecture: str = Field(description="Library and name of the architecture.")
    engine: str = Field(description="Engine, precision and device of the evaluation.")
    accuracy: float = Field(description="Top-1 accuracy, 0..1.")
    seconds_per_image: float = Field(description="Time per image of full batches, without loading.")


class AccuracyDifference(StoredRecord):
    """Accuracy of the cascade minus that of a network alone, for the same held-out rows."""

    value: float
    interval_95: tuple[float, float]
    p_value: float = Field(description="Of the exact McNemar test.")
    only_cascade: Count = Field(description="Rows that only the cascade predicts correctly.")
    only_network: Count = Field(description="Rows that only the network predicts correctly.")

    @classmethod
    def of(cls, difference: PairedDifference) -> "AccuracyDifference":
        """Create the record of a difference."""
        return cls(
            value=difference.value,
            interval_95=difference.interval,
            p_value=difference.p_value,
            only_cascade=difference.only_first,
            only_network=difference.only_second,
        )


class CascadeEvaluation(Document):
    """cascade.json: thresholds that were fitted, and accuracy and cost of the cascade on held-out rows.

    For the held-out figures, each half of the rows is evaluated with thresholds of the other half. The thresholds
    themselves are fitted on all rows.
    """

    format: Literal["batchcls-cascade"] = "batchcls-cascade"
    created: UtcTime
    settings: dict[str, Any]
    manifest: str = Field(description="Fingerprint of the labeled manifest.")
    rows: Count = Field(description="Rows that both networks predicted.")
    excluded: dict[str, Count] = Field(description="Other rows of the manifest, by reason.")
    small: CascadeNetwork
    large: CascadeNetwork
    thresholds: CascadeThresholds
    accuracy: float = Field(description="Top-1 accuracy of the cascade, 0..1.")
    large_fraction: float = Field(description="Share of the held-out rows that the large network predicts.")
    fitted_large_fraction: float = Field(
        description="Share of all rows that the large network predicts with the thresholds fitted on all rows."
    )
    from_large: AccuracyDifference
    from_small: AccuracyDifference
    price_per_hour: float | None = None

    @property
    def seconds_per_image(self) -> float:
        """Expected time per image of the cascade: of the small network, and of the large one for its share."""
        return self.small.seconds_per_image + self.large_fraction * self.large.seconds_per_image

    @property
    def relative_cost(self) -> float:
        """This time divided by that of the large network alone."""
        return self.seconds_per_image / self.large.seconds_per_image

    def cost_of_million(self, seconds_per_image: float) -> float:
        """The cost of inference for a million images: at the price, or in node-seconds without one."""
        price = 3600.0 if self.price_per_hour is None else self.price_per_hour
        return cost_of_million(seconds_per_image, price)


@dataclass(frozen=True, slots=True)
class CascadeResult:
    """Thresholds fitted on all N rows, and which rows thresholds of the other half keep with the small network."""

    fitted: FittedCascade
    kept: Flags
    small: Outcomes
    large: Outcomes

    @classmethod
    def of(cls, small: Outcomes, large: Outcomes, max_loss: float, confidence: float) -> "CascadeResult":
        """Fit and evaluate a cascade of two networks; arguments as in `fit_cascade`."""
        rows = PairedRows.of(small, large)
        kept = keeps_held_out(rows, small.truth, max_loss, confidence)
        return cls(fit_cascade(rows, max_loss, confidence), kept, small, large)

    @property
    def correct(self) -> Flags:
        """Whether the cascade predicts each of N held-out rows correctly."""
        return np.where(self.kept, self.small.correct, self.large.correct)

    @property
    def fitted_large_fraction(self) -> float:
        """Share of the rows that the large network predicts with the thresholds fitted on all of them."""
        return float((~self.fitted.keeps(PairedRows.of(self.small, self.large))).mean())

    @property
    def from_large(self) -> AccuracyDifference:
        """The difference from the large network."""
        return AccuracyDifference.of(PairedDifference.between(self.correct, self.large.correct))

    @property
    def from_small(self) -> AccuracyDifference:
        """The difference from the small network."""
        return AccuracyDifference.of(PairedDifference.between(self.correct, self.small.correct))

    @property
    def thresholds(self) -> CascadeThresholds:
        """The thresholds as they are stored."""
        own = np.flatnonzero(self.fitted.has_own).tolist()
        return CascadeThresholds(
            default=_finite(self.fitted.default),
            by_label={
                self.small.labels[index]: _finite(float(self.fitted.by_category[index])) for index in own
            },
        )

    def predictions(self, notes: pa.Table, rows: Rows) -> pa.Table:
        """Table of all rows of the manifest: the notes, the predictions of both networks and the held-out choice.

        Args:
            notes: table of all rows with the schema `labeled_rows.NOTES`.
            rows: row numbers of the N rows, ascending.
        """
        positions = np.full(notes.num_rows, -1, np.int64)
        positions[rows] = np.arange(len(rows))
        indices = pa.array(positions, mask=positions < 0)
        labels = pa.array(self.small.labels, pa.string())
        columns: dict[str, pa.Array] = {
            f"{name}_{column}": values
            for name, outcomes in ((SMALL, self.small), (LARGE, self.large))
            for column, values in (
                ("predicted", labels.take(pa.array(outcomes.predicted))),
                ("probability", pa.array(outcomes.probability)),
            )
        }
        columns["predicted_by"] = pa.array(np.where(self.kept, SMALL, LARGE).tolist(), pa.string())
        columns["correct"] = pa.array(self.correct)
        for name, values in columns.items():
            notes = notes.append_column(name, values.take(indices))
        return notes


def _finite(threshold: float) -> float | None:
    return threshold if np.isfinite(threshold) else None
