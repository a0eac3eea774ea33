"""The data of a run's report page.

IDs, URIs and labels are taken from the catalog unchanged, apart from truncation of very long strings;
the templates escape them.
"""

from dataclasses import dataclass
from datetime import datetime

from batchcls.runs.records import GateResult, Measurements

BINS = 20
"""Number of equal-width bins over 0..1 in a confidence histogram."""


@dataclass(frozen=True, slots=True)
class PublishStatus:
    """Whether the run is published, with a headline and an explanation, which may be empty."""

    published: bool
    headline: str
    explanation: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """A catalog string: its first characters (None if it is null) and its total length."""

    start: str | None
    length: int


@dataclass(frozen=True, slots=True)
class PredictedRow:
    """One row of the run with a prediction.

    Attributes:
        row: number in the manifest.
        item_id: ID of the item in the catalog.
        label: the predicted class; None if its probability is below the threshold (`classify --abstain`).
        probability: probability of the top-1 class, 0..1.
        runner_up: the second class and its probability, or the top-1 class if there is no label; None if
            only one class was stored.
        uri: URI of the image, null if the image is stored in the manifest.
        content_hash: SHA-256 of the file that was classified, hex.
    """

    row: int
    item_id: Text
    label: str | None
    probability: float
    runner_up: tuple[str, float] | None
    uri: Text
    content_hash: str | None


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """One row in quarantine.

    Attributes:
        row: number in the manifest.
        item_id, uri: as in `PredictedRow`; the ID may be null.
        detail: error message of the stage that rejected the row.
        n_bytes: size of the file, None if unknown.
        attempts: number of fetch attempts.
        content_hash: SHA-256 of the file, hex; None if no file was fetched.
    """

    row: int
    item_id: Text
    uri: Text
    detail: str
    n_bytes: int | None
    attempts: int
    content_hash: str | None


@dataclass(frozen=True, slots=True)
class QuarantineGroup:
    """The number of rows quarantined for one reason, and the first of them."""

    reason: str
    rows: int
    first: tuple[QuarantinedRow, ...]


@dataclass(frozen=True, slots=True)
class Confidence:
    """Distribution of the top-1 probability.

    Attributes:
        bins: number of rows in each of `BINS` bins.
        mean: mean probability, 0..1.
        bins_before, mean_before: the same for the baseline run; None without one.
        least_confident, most_confident: example rows at both ends.
    """

    bins: tuple[int, ...]
    mean: float
    bins_before: tuple[int, ...] | None
    mean_before: float | None
    least_confident: tuple[PredictedRow, ...]
    most_confident: tuple[PredictedRow, ...]


@dataclass(frozen=True, slots=True)
class Category:
    """A label with its row counts in this run and in the baseline run (None without one)."""

    label: str
    rows: int
    rows_before: int | None
    mean_probability: float | None


@dataclass(frozen=True, slots=True)
class CategoryMix:
    """Distribution of the predicted labels.

    Attributes:
        count: number of labels with rows in either run.
        predictions, predictions_before: total rows, the denominators of the shares.
        largest: the labels with the most rows, in descending order.
        moved: the labels whose share changed most, in descending order; empty without a baseline run.
        examples: the most and the least confident rows of the largest labels.
    """

    count: int
    predictions: int
    predictions_before: int | None
    largest: tuple[Category, ...]
    moved: tuple[Category, ...]
    examples: tuple[tuple[Category, tuple[PredictedRow, ...]], ...]


@dataclass(frozen=True, slots=True)
class LabelFlow:
    """Rows whose label changed from `before` to `after`, with examples; None stands for abstention."""

    before: str | None
    after: str | None
    rows: int
    items: tuple[PredictedRow, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """Differences from the baseline run by item ID, over the rows with a prediction in either run.

    Attributes:
        run_id: ID of the baseline run.
        same, changed: items in both runs with the same and with a different label.
        new, removed: items with a prediction in this run only and in the baseline run only.
        flows: the most frequent label changes, in descending order.
        flow_count: total number of distinct label changes.
        causes: description and item count of each cause of change; empty if unknown.
        mapped: items in both runs with another label that corresponds to the old one by the label map.
    """

    run_id: str
    same: int
    changed: int
    new: int
    removed: int
    flows: tuple[LabelFlow, ...]
    flow_count: int
    causes: tuple[tuple[str, int], ...] = ()
    mapped: int = 0

    @property
    def both(self) -> int:
        """Items in both runs."""
        return self.same + self.mapped + self.changed


@dataclass(frozen=True, slots=True)
class MappedLabel:
    """A label of the label map, with its row counts.

    Attributes:
        kind: renamed, merged, retired or split.
        before: labels of the bundle.
        after: label of the run; None if they were retired without a replacement.
        rows: rows of the run with this label.
        rows_before: rows of the baseline run with one of these labels, before or after a map; None without a baseline
            run, and where an earlier line counts them.
    """

    kind: str
    before: tuple[str, ...]
    after: str | None
    rows: int
    rows_before: int | None


@dataclass(frozen=True, slots=True)
class BaselineFacts:
    """Counts from the record of the baseline run; `images_per_second` is None if it was not measured."""

    run_id: str
    rows: int
    quarantined: int
    images_per_second: float | None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Everything that the report page of a run shows, except for thumbnails.

    Attributes:
        run_id: ID of the run.
        committed: commit time, with a time zone.
        publish_status: whether the run is published, and why.
        gates: gate results in evaluation order.
        rows, predicted, reused, reheaded, shared: rows of the manifest, and rows by origin as in `records.Counts`.
        quarantine_groups: quarantined rows by reason, the most frequent first.
        measurements: of the session that finished the run; without a bottleneck if it computed no row.
        confidence, categories: None if no row has a prediction.
        changes: None without a baseline run.
        by_network: rows with a prediction by the network of a cascade; empty without one.
        expected_large_fraction: share of the rows that the large network of a cascade was expected to predict; None
            without an estimate.
        label_map: the labels that the label map changes; empty without a map.
        facts: name and value of further properties: manifest, model, engine, hardware.
        folder: URI of the run folder, without credentials.
        before: counts of the baseline run, None without one.
    """

    run_id: str
    committed: datetime
    publish_status: PublishStatus
    gates: tuple[GateResult, ...]
    rows: int
    predicted: int
    reused: int
    reheaded: int
    shared: int
    quarantine_groups: tuple[QuarantineGroup, ...]
    measurements: Measurements
    confidence: Confidence | None
    categories: CategoryMix | None
    changes: Changes | None
    facts: tuple[tuple[str, str], ...]
    folder: str
    before: BaselineFacts | None
    label_map: tuple[MappedLabel, ...] = ()
    by_network: tuple[tuple[str, int], ...] = ()
    expected_large_fraction: float | None = None

    @property
    def quarantined(self) -> int:
        """Total number of rows in quarantine."""
        return sum(group.rows for group in self.quarantine_groups)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A thumbnail as a data: URI, or the reason why it is missing; exactly one of the two is empty."""

    source: str
    reason: str
