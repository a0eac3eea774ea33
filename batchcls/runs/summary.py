"""Summarize the predictions of a run: categories, confidence and embeddings, in one pass with bounded memory.

The summary is computed before run.json is written, from the files in the receipts, because the gates use it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from batchcls.runs.bounded_query import connect
from batchcls.runs.catalog import open_files, read_columns
from batchcls.runs.label_groups import CORRESPONDS, JOIN_LABEL_GROUPS, LabelGroups
from batchcls.runs.records import HISTOGRAM_BINS, EmbeddingStatistics, RunFile, RunRecord, Summary
from batchcls.storage.filesystem import Storage

_SAMPLES = 200

_BY_LABEL = f"""
SELECT coalesce(label, '') AS label, least(floor(probability * {HISTOGRAM_BINS}), {HISTOGRAM_BINS - 1})::INTEGER AS bin,
       count(*) AS items, sum(probability::DOUBLE) AS confidence, sum(probability::DOUBLE * probability) AS squares
FROM predictions GROUP BY ALL
"""


def summarize(folder: str, files: Sequence[RunFile], storage: Storage) -> Summary:
    """Read the label, the probability and the embedding of every predicted row once.

    Args:
        folder: URI of the folder of the run.
        files: its files, of both kinds, from receipts or from run.json.
        storage: access to the folder.

    Raises:
        InputError: a file is missing or unreadable.
    """
    predictions = open_files(
        folder, [file for file in files if file.kind == "predictions"], "predictions", storage
    )
    return summarize_rows(predictions)


def summary_of(record: RunRecord, storage: Storage) -> Summary:
    """The summary in run.json; computed from the files if run.json has none."""
    return record.summary or summarize(record.folder, record.files, storage)


def summarize_rows(predictions: ds.Dataset) -> Summary:
    """The same for a dataset of predictions."""
    dimension = _dimension(predictions.schema)
    norms = _Norms()
    columns = ["label", "probability", *(["embedding"] if dimension else [])]
    schema = pa.schema([predictions.schema.field(name) for name in columns[:2]])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in read_columns(predictions, columns):
            if dimension:
                norms.add(batch.column(2), dimension)
            yield batch.select(columns[:2])

    with connect() as connection:
        connection.register("predictions", pa.RecordBatchReader.from_batches(schema, batches()))
        rows = connection.execute(_BY_LABEL).fetchall()
    return _collect(rows, norms.result(dimension) if dimension else None)


def _collect(
    rows: Sequence[tuple[str, int | None, int, float | None, float | None]],
    embeddings: EmbeddingStatistics | None,
) -> Summary:
    categories: Counter[str] = Counter()
    histogram = [0] * HISTOGRAM_BINS
    total = squares = 0.0
    for label, bin_number, items, confidence, square in rows:
        categories[label] += items
        if bin_number is not None:
            histogram[max(0, bin_number)] += items
        total += confidence or 0.0
        squares += square or 0.0
    predictions = categories.total()
    ordered = dict(sorted(categories.items(), key=lambda item: (-item[1], item[0])))
    mean = total / predictions if predictions else None
    deviation = None if mean is None else float(np.sqrt(max(0.0, squares / predictions - mean * mean)))
    return Summary(
        predictions=predictions,
        categories=ordered,
        mean_confidence=mean,
        std_confidence=deviation,
        confidence_histogram=tuple(histogram),
        embeddings=embeddings,
    )


def _dimension(schema: pa.Schema) -> int:
    """Dimension of the embeddings; 0 without embeddings."""
    return schema.field("embedding").type.list_size if "embedding" in schema.names else 0


@dataclass(slots=True)
class _Norms:
    """Sums over the norms of embeddings, in float64."""

    rows: int = 0
    non_finite: int = 0
    total: float = 0.0
    squares: float = 0.0
    _chunk: int = field(default=8192, repr=False)

    def add(self, column: pa.Array, dimension: int) -> None:
        values = column.drop_null().flatten()
        flat = values.to_numpy(zero_copy_only=False).reshape(-1, dimension)
        for start in range(0, len(flat), self._chunk):
            self._add(flat[start : start + self._chunk])

    def _add(self, embeddings: npt.NDArray[Any]) -> None:
        wide = embeddings.astype(np.float32, copy=False)
        squares = np.einsum("ij,ij->i", wide, wide, dtype=np.float32).astype(np.float64)
        for row in np.flatnonzero(~np.isfinite(squares)):
            # The norm may overflow float32 although all values are finite, so it is computed again in float64.
            squares[row] = float(np.square(embeddings[row].astype(np.float64)).sum())
        finite = np.isfinite(squares)
        norms = np.sqrt(squares[finite])
        self.rows += len(norms)
        self.non_finite += int(len(squares) - len(norms))
        self.total += float(norms.sum())
        self.squares += float(squares[finite].sum())

    def result(self, dimension: int) -> EmbeddingStatistics:
        mean = self.total / self.rows if self.rows else 0.0
        variance = max(0.0, self.squares / self.rows - mean * mean) if self.rows else 0.0
        return EmbeddingStatistics(
            dimension=dimension,
            rows=self.rows,
            mean_norm=mean,
            std_norm=float(np.sqrt(variance)),
            non_finite=self.non_finite,
        )


def changed_labels(new: ds.Dataset, old: ds.Dataset, groups: LabelGroups | None = None) -> tuple[int, int]:
    """Count the items with predictions in both runs, and those of them whose label changed, appeared or vanished.

    Args:
        new: predictions of the new run.
        old: predictions of the old run.
        groups: labels that correspond to each other after the label maps; None: equal labels only.
    """
    with connect() as connection:
        (groups or LabelGroups()).register(connection)
        for name, dataset in (("new", new), ("old", old)):
            connection.register(name, read_columns(dataset, ["item_id", "label"]))
        found = connection.execute(
            f"SELECT count(*), count(*) FILTER (NOT {CORRESPONDS}) "
            f"FROM new JOIN old USING (item_id) {JOIN_LABEL_GROUPS}"
        ).fetchone()
    compared, changed = found or (0, 0)
    return int(compared), int(changed)


def shares(categories: Mapping[str, int], labels: Sequence[str]) -> npt.NDArray[np.float64]:
    """The fraction of rows with each of these labels; all zeros without rows."""
    counts = np.array([categories.get(label, 0) for label in labels], np.float64)
    return np.divide(counts, max(1.0, float(counts.sum())))


def jensen_shannon(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Jensen-Shannon distance of two category mixes, base 2: 0 if they are equal, 1 if they have no overlap."""
    labels = sorted(set(first) | set(second))
    return float(np.sqrt(_divergence(shares(first, labels), shares(second, labels))))


def divergence_by_chance(first: Mapping[str, int], second: Mapping[str, int], quantile: float) -> float:
    """The quantile `quantile` of the Jensen-Shannon divergence (the distance squared) between random samples.

    Both samples are drawn from the combined category mix with the original sizes, 200 times with a fixed seed. Small
    samples of many categories differ even if they are drawn from the same mix.
    """
    labels = sorted(set(first) | set(second))
    counts = [sum(sample.values()) for sample in (first, second)]
    combined = np.array([first.get(label, 0) + second.get(label, 0) for label in labels], np.float64)
    random = np.random.default_rng(0)
    mix = combined / combined.sum()
    drawn = [
        _divergence(*(random.multinomial(count, mix) / count for count in counts)) for _ in range(_SAMPLES)
    ]
    return float(np.quantile(drawn, quantile))


def _divergence(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence of two mixes over the same categories, in bits, 0..1."""
    middle, divergence = (first + second) / 2, 0.0
    for side in (first, second):
        present = side > 0
        divergence += float((side[present] * np.log2(side[present] / middle[present])).sum()) / 2
    return max(0.0, divergence)
