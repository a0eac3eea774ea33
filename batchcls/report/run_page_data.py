"""What the page of a run shows: plain records, so that the page is made and tested without a run.

Ids, addresses and labels in here are as the catalog has them, only cut where they are very long; it is
the page that escapes them.
"""

from dataclasses import dataclass
from datetime import datetime

BINS = 20
"""Bins of equal width over 0..1 in a confidence histogram."""


@dataclass(frozen=True, slots=True)
class PublishStatus:
    """What became of the publish, in a few words, and why; `because` is empty where nothing is to be said."""

    published: bool
    headline: str
    because: str = ""


@dataclass(frozen=True, slots=True)
class Gate:
    """What one gate found.

    Attributes:
        name: of the gate.
        figure: what was measured, with its unit; "-" where there was nothing to measure.
        limit: what was allowed.
        passed: whether it lets the run through.
        sentence: what it holds against what, for people.
    """

    name: str
    figure: str
    limit: str
    passed: bool
    sentence: str


@dataclass(frozen=True, slots=True)
class Text:
    """A string of the catalog: its first characters, and how many there are in all; None where it is null."""

    start: str | None
    length: int


@dataclass(frozen=True, slots=True)
class PredictedRow:
    """One row of the run with a prediction.

    Attributes:
        row: number in the manifest.
        item_id: the shop's name for it.
        label: the best class; None where its probability is below its threshold (`classify --abstain`).
        probability: of the best class, 0..1.
        runner_up: the second class and its probability, or the best one where there is no label; None where
            only one was kept.
        uri: address of its image, null where the manifest holds the image itself.
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
class Failed:
    """One row in quarantine.

    Attributes:
        row: number in the manifest.
        item_id, uri: as in `PredictedRow`; the id may be null.
        detail: what the stage that refused the row said.
        n_bytes: size of the file, None where it is not known.
        attempts: how often it was asked for.
        content_hash: SHA-256 of the file, hex; None where there was none to hash.
    """

    row: int
    item_id: Text
    uri: Text
    detail: str
    n_bytes: int | None
    attempts: int
    content_hash: str | None


@dataclass(frozen=True, slots=True)
class Refused:
    """All rows that are in quarantine for one reason, and the first of them."""

    reason: str
    rows: int
    first: tuple[Failed, ...]


@dataclass(frozen=True, slots=True)
class Confidence:
    """How sure the model was of its best class.

    Attributes:
        bins: rows by probability, `BINS` of them.
        mean: of the probability, 0..1.
        bins_before, mean_before: of the earlier run; None where there is none.
        least_sure, most_sure: rows at both ends.
    """

    bins: tuple[int, ...]
    mean: float
    bins_before: tuple[int, ...] | None
    mean_before: float | None
    least_sure: tuple[PredictedRow, ...]
    most_sure: tuple[PredictedRow, ...]


@dataclass(frozen=True, slots=True)
class Category:
    """A label of the run: rows now and in the earlier run (None without one), and how sure the model was."""

    label: str
    rows: int
    rows_before: int | None
    mean_probability: float | None


@dataclass(frozen=True, slots=True)
class CategoryMix:
    """The category mix.

    Attributes:
        count: labels that have rows, now or before.
        predictions, predictions_before: the totals that shares are of.
        largest: those with the most rows, in order.
        moved: those whose share changed most, in order; empty without an earlier run.
        examples: the most and the least sure rows of the largest.
    """

    count: int
    predictions: int
    predictions_before: int | None
    largest: tuple[Category, ...]
    moved: tuple[Category, ...]
    examples: tuple[tuple[Category, tuple[PredictedRow, ...]], ...]


@dataclass(frozen=True, slots=True)
class LabelFlow:
    """Rows that changed from one label to another, and some of them; None is no label, where the job abstained."""

    before: str | None
    after: str | None
    rows: int
    items: tuple[PredictedRow, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """What is different from the earlier run, by item id, over the rows with a prediction in either.

    Attributes:
        run_id: of the earlier run.
        same, changed: items of both runs, by whether their label is the same.
        new, gone: items that only this run or only the earlier one has.
        flows: those with the most rows, in order.
        flow_count: how many pairs of labels there are in all.
        causes: why items changed, and how many for each cause; empty where that is not known.
    """

    run_id: str
    same: int
    changed: int
    new: int
    gone: int
    flows: tuple[LabelFlow, ...]
    flow_count: int
    causes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StageCost:
    """What an image cost one stage, and how busy what the stage works on was, 0..1."""

    stage: str
    milliseconds: float
    resource: str
    capacity: float
    utilization: float


@dataclass(frozen=True, slots=True)
class RunThroughput:
    """How fast the run was, and what limited it.

    Attributes:
        images_per_second: over the whole pipeline.
        after_start: the rate once the workers were up.
        ideal: what the scarcest resource would have allowed; None where none was used.
        start_seconds, total_seconds: of start-up, and of the whole job.
        limited_by: the stage that limits.
        advice: what to change.
        stages: in the order of the flow.
    """

    images_per_second: float
    after_start: float
    ideal: float | None
    start_seconds: float
    total_seconds: float
    limited_by: str
    advice: str
    stages: tuple[StageCost, ...]


@dataclass(frozen=True, slots=True)
class Before:
    """What the earlier run's record says of itself; `images_per_second` is None where it was not measured."""

    run_id: str
    rows: int
    quarantined: int
    images_per_second: float | None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """All that the page of a run shows.

    Attributes:
        run_id: name of the run.
        committed: when it was committed, with its time zone.
        verdict: what became of the publish.
        gates: in the order in which they were asked.
        rows, predicted, reused: rows of the manifest, those answered now, those taken from another run.
        refused: those in quarantine by reason, the most frequent first.
        throughput: None where nothing was computed.
        confidence, categories: None where no row has a prediction.
        changes: None without an earlier run.
        facts: name and value of what else is known: manifest, model, engine, hardware.
        folder: of the run, fit to be shown.
        before: figures of the earlier run's own record, None without one.
    """

    run_id: str
    committed: datetime
    verdict: PublishStatus
    gates: tuple[Gate, ...]
    rows: int
    predicted: int
    reused: int
    refused: tuple[Refused, ...]
    throughput: RunThroughput | None
    confidence: Confidence | None
    categories: CategoryMix | None
    changes: Changes | None
    facts: tuple[tuple[str, str], ...]
    folder: str
    before: Before | None

    @property
    def quarantined(self) -> int:
        """Rows in quarantine, for whatever reason."""
        return sum(group.rows for group in self.refused)


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small image as a data: URI, or why there is none; exactly one of the two is empty."""

    source: str
    reason: str
