"""Summarize the rows of a run: categories, confidence and embeddings, in one pass with bounded memory.

It is made of the files that the receipts name, before run.json is written, since gates are judged by it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from batchcls.runs.bounded_query import connect
from batchcls.runs.catalog import RunRecord, open_files, read_columns
from batchcls.runs.parts import PartFile
from batchcls.runs.records import HISTOGRAM_BINS
from batchcls.storage.filesystem import Storage

_SAMPLES = 200

_BY_LABEL = f"""
SELECT coalesce(label, '') AS label, least(floor(probability * {HISTOGRAM_BINS}), {HISTOGRAM_BINS - 1})::INTEGER AS bin,
       count(*) AS items, sum(probability::DOUBLE) AS confidence, sum(probability::DOUBLE * probability) AS squares
FROM answers GROUP BY ALL
"""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Euclidean lengths of a run's embeddings; rows with NaN or infinity are counted and left out of them."""

    dimension: int
    rows: int
    mean_norm: float
    std_norm: float
    non_finite: int


_EMBEDDING_FIELDS = tuple(entry.name for entry in fields(Embeddings))


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's answers together.

    Attributes:
        answered: rows with an answer, computed or reused.
        categories: rows by label, the largest first; the empty label is that of rows without one, where the job
            abstained.
        mean_confidence: mean probability of the best label, 0..1; None without answers.
        std_confidence: its standard deviation; of a run that did not keep it, the largest that its mean allows.
        confidence_histogram: rows by confidence, `HISTOGRAM_BINS` of them.
        embeddings: None where the run has none.
    """

    answered: int
    categories: Mapping[str, int]
    mean_confidence: float | None
    std_confidence: float | None
    confidence_histogram: tuple[int, ...]
    embeddings: Embeddings | None = None

    def as_json(self) -> dict[str, Any]:
        """For run.json."""
        found = self.embeddings
        return {
            "answered": self.answered,
            "categories": dict(self.categories),
            "mean_confidence": self.mean_confidence,
            "std_confidence": self.std_confidence,
            "confidence_histogram": list(self.confidence_histogram),
            "embeddings": None
            if found is None
            else {
                "dimension": found.dimension,
                "rows": found.rows,
                "mean_norm": found.mean_norm,
                "std_norm": found.std_norm,
                "non_finite": found.non_finite,
            },
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """The reverse of `as_json`, of an object that `documents.RunDocument` has checked."""
        found = raw["embeddings"]
        mean = None if raw["mean_confidence"] is None else float(raw["mean_confidence"])
        # Of values in 0..1 with mean m the variance is at most m (1 - m) (Bhatia and Davis, 2000).
        widest = None if mean is None else float(np.sqrt(max(0.0, mean * (1 - mean))))
        return cls(
            answered=int(raw["answered"]),
            categories={str(label): int(count) for label, count in raw["categories"].items()},
            mean_confidence=mean,
            std_confidence=raw.get("std_confidence", widest),
            confidence_histogram=tuple(int(count) for count in raw["confidence_histogram"]),
            embeddings=None
            if found is None
            else Embeddings(**{name: found[name] for name in _EMBEDDING_FIELDS}),
        )


def summarize(folder: str, files: Sequence[PartFile], storage: Storage) -> Summary:
    """Read the label, the probability and the embedding of every answered row once.

    Args:
        folder: URI of the run's folder.
        files: its files, of both kinds, from receipts or from run.json.
        storage: how to reach them.

    Raises:
        InputError: a file is missing or unreadable.
    """
    predictions = open_files(
        folder, [file for file in files if file.kind == "predictions"], "predictions", storage
    )
    return summarize_rows(predictions)


def summary_of(record: RunRecord, storage: Storage) -> Summary:
    """The summary in run.json, or made again for a run that has none."""
    raw = record.raw.get("summary")
    if raw is None:
        return summarize(record.folder, record.files, storage)
    return Summary.from_json(raw)


def summarize_rows(predictions: ds.Dataset) -> Summary:
    """The same for a dataset of predictions."""
    dimension = _dimension(predictions.schema)
    norms = _Norms()
    columns = ["label", "probability", *(["embedding"] if dimension else [])]
    schema = pa.schema([predictions.schema.field(name) for name in columns[:2]])

    def answers() -> Iterator[pa.RecordBatch]:
        for batch in read_columns(predictions, columns):
            if dimension:
                norms.add(batch.column(2), dimension)
            yield batch.select(columns[:2])

    with connect() as connection:
        connection.register("answers", pa.RecordBatchReader.from_batches(schema, answers()))
        rows = connection.execute(_BY_LABEL).fetchall()
    return _collected(rows, norms.result(dimension) if dimension else None)


def _collected(
    rows: Sequence[tuple[str, int | None, int, float | None, float | None]], found: Embeddings | None
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
    answered = categories.total()
    ordered = dict(sorted(categories.items(), key=lambda item: (-item[1], item[0])))
    mean = total / answered if answered else None
    deviation = None if mean is None else float(np.sqrt(max(0.0, squares / answered - mean * mean)))
    return Summary(answered, ordered, mean, deviation, tuple(histogram), found)


def _dimension(schema: pa.Schema) -> int:
    """Length of the embeddings; 0 where there are none."""
    return schema.field("embedding").type.list_size if "embedding" in schema.names else 0


@dataclass(slots=True)
class _Norms:
    """Sums over the lengths of embeddings, in float64."""

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
            # Too long for float32 is not yet infinite: such rows are looked at again.
            squares[row] = float(np.square(embeddings[row].astype(np.float64)).sum())
        finite = np.isfinite(squares)
        norms = np.sqrt(squares[finite])
        self.rows += len(norms)
        self.non_finite += int(len(squares) - len(norms))
        self.total += float(norms.sum())
        self.squares += float(squares[finite].sum())

    def result(self, dimension: int) -> Embeddings:
        mean = self.total / self.rows if self.rows else 0.0
        variance = max(0.0, self.squares / self.rows - mean * mean) if self.rows else 0.0
        return Embeddings(dimension, self.rows, mean, float(np.sqrt(variance)), self.non_finite)


def changed_labels(new: ds.Dataset, old: ds.Dataset) -> tuple[int, int]:
    """How many items both runs have answered, and how many of these got another label, or lost or gained one."""
    with connect() as connection:
        for name, dataset in (("new", new), ("old", old)):
            connection.register(name, read_columns(dataset, ["item_id", "label"]))
        found = connection.execute(
            "SELECT count(*), count(*) FILTER (new.label IS DISTINCT FROM old.label) FROM new JOIN old USING (item_id)"
        ).fetchone()
    compared, changed = found or (0, 0)
    return int(compared), int(changed)


def shares(categories: Mapping[str, int], labels: Sequence[str]) -> npt.NDArray[np.float64]:
    """The category mix over these labels; all zeros where there are no rows."""
    counts = np.array([categories.get(label, 0) for label in labels], np.float64)
    return np.divide(counts, max(1.0, float(counts.sum())))


def jensen_shannon(first: Mapping[str, int], second: Mapping[str, int]) -> float:
    """Jensen-Shannon distance of two category mixes, base 2: 0 for equal ones, 1 for ones without overlap."""
    labels = sorted(set(first) | set(second))
    return float(np.sqrt(_divergence(shares(first, labels), shares(second, labels))))


def divergence_by_chance(first: Mapping[str, int], second: Mapping[str, int], share: float) -> float:
    """The Jensen-Shannon divergence (the distance squared) below which `share` of all pairs of samples are.

    Both samples are of the mix that the two have together, as large as the two are, drawn 200 times with a
    fixed seed: a hundred rows in a hundred categories never have the same mix twice.
    """
    labels = sorted(set(first) | set(second))
    counts = [sum(sample.values()) for sample in (first, second)]
    together = np.array([first.get(label, 0) + second.get(label, 0) for label in labels], np.float64)
    random = np.random.default_rng(0)
    mix = together / together.sum()
    drawn = [
        _divergence(*(random.multinomial(count, mix) / count for count in counts)) for _ in range(_SAMPLES)
    ]
    return float(np.quantile(drawn, share))


def _divergence(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence of two mixes over the same categories, in bits, 0..1."""
    middle, divergence = (first + second) / 2, 0.0
    for side in (first, second):
        there = side > 0
        divergence += float((side[there] * np.log2(side[there] / middle[there])).sum()) / 2
    return max(0.0, divergence)
