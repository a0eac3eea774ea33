"""Runs a bundle on a labeled manifest in this process and stores the logits."""

import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.errors import InputError
from batchcls.evaluation.classification_metrics import Categories, Floats, Outcomes, Rows
from batchcls.evaluation.labeled_rows import LabeledManifest, LabeledPart, with_failures
from batchcls.images.load_config import LoadSettings
from batchcls.images.loader import Loader
from batchcls.inference.postprocess import mean_probabilities
from batchcls.inference.predictor import pixels_of
from batchcls.models.engines.batching import predict_batches
from batchcls.models.engines.engine import Engine
from batchcls.schema import PIXELS, ROW, Reason

_CHUNK_VALUES = 4_194_304  # 16 MiB of float32 logits per chunk
_IN_MEMORY_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class LogitStore:
    """Logits of N labeled rows.

    Attributes:
        labels: Names of the K categories.
        truth: N indices of the true categories.
        logits: N * V x K logits; the views of an image are adjacent.
        views: Number of views V per image, whose probabilities are averaged.
    """

    labels: tuple[str, ...]
    truth: Categories
    logits: Floats
    views: int = 1

    def __len__(self) -> int:
        return len(self.truth)

    def chunks(self, rows: Rows | None = None) -> Iterator[tuple[Floats, Categories]]:
        """Iterate over chunks of the rows (None: all rows) as n * V x K logits and n true categories."""
        size = max(1, _CHUNK_VALUES // (self.views * len(self.labels)))
        by_row = self.logits.reshape(-1, self.views, len(self.labels))
        for start in range(0, len(self) if rows is None else len(rows), size):
            part = slice(start, start + size) if rows is None else rows[start : start + size]
            yield np.ascontiguousarray(by_row[part]).reshape(-1, len(self.labels)), self.truth[part]

    def probabilities(self, temperature: float) -> Iterator[tuple[Floats, Categories]]:
        """Iterate over chunks of n x K probabilities, computed as in `classify`, and n true categories."""
        for logits, truth in self.chunks():
            yield mean_probabilities(logits, self.views, temperature), truth

    def outcomes(self, temperature: float) -> Outcomes:
        """Outcomes at a temperature, with predictions computed as in `classify`."""
        parts = [_outcomes(probabilities, truth) for probabilities, truth in self.probabilities(temperature)]
        predicted, probability, rank = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Outcomes(self.labels, self.truth, predicted, probability, rank)


def _outcomes(probabilities: Floats, truth: Categories) -> tuple[Categories, Floats, Categories]:
    predicted = probabilities.argmax(axis=1)
    rows = np.arange(len(truth))
    true_probability = probabilities[rows, truth][:, None]
    # As in top_k, ties are ordered by class index.
    lower_index = np.arange(probabilities.shape[1])[None] < truth[:, None]
    ahead = (probabilities > true_probability) | ((probabilities == true_probability) & lower_index)
    rank = ahead.sum(axis=1)
    return predicted.astype(np.int32), probabilities[rows, predicted], rank.astype(np.int32)


@contextmanager
def allocate_logits(rows: int, categories: int) -> Iterator[npt.NDArray[np.float32]]:
    """Allocate an array of rows x categories logits; above 512 MiB it is mapped to a temporary file.

    Raises:
        InputError: The temporary folder does not have enough free space.
    """
    needed = 4 * rows * categories
    if needed <= _IN_MEMORY_BYTES:
        yield np.empty((rows, categories), np.float32)
        return
    with tempfile.TemporaryDirectory(prefix="batchcls-logits-") as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"the logits of {rows} rows x {categories} categories take {needed / 2**30:.1f} GiB, but "
                f"{tempfile.gettempdir()} has only {free / 2**30:.1f} GiB of free space; set TMPDIR to a folder on a "
                "larger disk, or use --limit"
            )
        yield np.memmap(Path(folder) / "logits", np.float32, "w+", shape=(rows, categories))


class LabeledPredictor:
    """Predicts the rows of a labeled manifest once.

    Attributes:
        rows: Number of rows processed so far.
        failures: Number of failed rows by reason so far. Both may be read from another thread.
        first_batch: Pixels of the first batch; None before it was predicted.
    """

    def __init__(self, labeled: LabeledManifest, labels: tuple[str, ...], engine: Engine) -> None:
        self._labeled = labeled
        self._labels = labels
        self._engine = engine
        self._batch_counts: deque[list[int]] = deque()
        self._notes: list[pa.Table] = []
        self._pending: deque[LabeledPart] = deque()
        self._predicted: list[tuple[Rows, Categories]] = []
        self._failed: dict[int, str] = {}
        self.rows = 0
        self.failures: Counter[str] = Counter()
        self.first_batch: npt.NDArray[np.uint8] | None = None

    def run(self, load: LoadSettings, buffer: Floats) -> tuple[pa.Table, Rows, LogitStore]:
        """Predict every row whose label is one of the model's.

        Args:
            load: Settings for loading; `block_rows` is also the maximum number of crops per forward pass.
            buffer: Array for the logits, with one row per view of each row of the manifest.

        Returns:
            The table of all rows with the schema `labeled_rows.NOTES`, the row numbers of the predicted rows,
            and their logits.

        Raises:
            InputError: No row could be evaluated; the message lists the reasons.
        """
        filled, views = 0, load.views.count
        flags: list[npt.NDArray[np.bool_]] = [np.empty(0, bool)]
        for logits in self._logits(load):
            finite = np.asarray(np.isfinite(logits).reshape(-1, views * logits.shape[1]).all(axis=1))
            valid = logits[np.repeat(finite, views)]
            buffer[filled : filled + len(valid)] = valid
            filled += len(valid)
            flags.append(finite)
        rows, truth = _concat(self._predicted)
        finite = np.concatenate(flags)
        self._add_failures(dict.fromkeys(rows[~finite].tolist(), Reason.NON_FINITE.value))
        notes = with_failures(pa.concat_tables(self._notes).combine_chunks(), self._failed)
        if filled == 0:
            raise InputError(no_rows_message(notes))
        return notes, rows[finite], LogitStore(self._labels, truth[finite], buffer[:filled], views)

    def _logits(self, load: LoadSettings) -> Iterator[Floats]:
        """Yield the n * V x K logits of each block. The views of an image are adjacent: each crop, then its flip."""
        outputs = predict_batches(self._engine, self._batches(Loader(load), load))
        for first in outputs:
            # All batches of a block are consecutive, and `_batches` appended their counts before the first one.
            logits = [first.logits]
            counts = self._batch_counts.popleft()
            logits += [next(outputs).logits for _ in range(sum(counts) - 1)]
            ends = np.cumsum(counts)
            flips = [
                np.concatenate(logits[end - count : end]) for end, count in zip(ends, counts, strict=True)
            ]
            yield np.stack(flips, axis=1).reshape(-1, len(self._labels))

    def _batches(self, loader: Loader, load: LoadSettings) -> Iterator[npt.NDArray[np.uint8]]:
        for block in loader.load(self._tables(load.block_rows), {}):
            part = self._pending.popleft()
            pixels = block.column(PIXELS).combine_chunks()
            decoded = pixels.is_valid().to_numpy(zero_copy_only=False)
            rows = block.column(ROW).to_numpy()
            reasons = block.column("reason").to_pylist()
            self._add_failures({int(rows[index]): reasons[index] for index in np.flatnonzero(~decoded)})
            self._predicted.append((rows[decoded], part.truth[decoded]))
            self.rows += part.notes.num_rows
            if not decoded.any():
                continue
            crops = pixels_of(pixels, load.preprocessing.shape)
            starts = range(0, len(crops), load.block_rows)
            if self.first_batch is None:
                self.first_batch = crops[: load.block_rows].copy()
            views = (crops, crops[:, :, ::-1]) if load.views.flips else (crops,)
            self._batch_counts.append([len(starts)] * len(views))
            for view in views:
                for start in starts:
                    yield view[start : start + load.block_rows]

    def _tables(self, block_rows: int) -> Iterator[pa.Table]:
        for part in self._labeled.parts(self._labels, block_rows):
            self._notes.append(part.notes)
            if part.rows.num_rows:
                self._pending.append(part)
                yield part.rows
            else:
                self.rows += part.notes.num_rows

    def _add_failures(self, failed: dict[int, str]) -> None:
        self._failed |= failed
        self.failures.update(failed.values())


def no_rows_message(notes: pa.Table) -> str:
    """Error message for a manifest without rows that can be evaluated."""
    reasons = Counter(notes.column("reason").drop_null().to_pylist()).most_common()
    labels = notes.column("label").drop_null().unique().to_pylist()[:5]
    return (
        f"none of the {notes.num_rows} rows can be evaluated "
        f"({', '.join(f'{reason}={count}' for reason, count in reasons)}); the labels in the manifest are "
        f"{', '.join(map(repr, labels)) or 'all null'}: they must be class names of the model"
    )


def _concat(parts: list[tuple[Rows, Categories]]) -> tuple[Rows, Categories]:
    rows, truth = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for part_rows, part_truth in parts:
        rows.append(part_rows)
        truth.append(part_truth)
    return np.concatenate(rows), np.concatenate(truth)
