"""Predicts a labeled manifest with a bundle in this process and stores the logits."""

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

_CHUNK_VALUES = 4_194_304  # 16 MiB of logits at a time
_IN_MEMORY_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class LogitStore:
    """What a network says about N rows whose right category is known.

    Attributes:
        labels: K names.
        truth: N categories, by number.
        logits: N * V x K, the views of an image next to each other.
        views: V, the forward passes of an image whose probabilities are averaged.
    """

    labels: tuple[str, ...]
    truth: Categories
    logits: Floats
    views: int = 1

    def __len__(self) -> int:
        return len(self.truth)

    def chunks(self, rows: Rows | None = None) -> Iterator[tuple[Floats, Categories]]:
        """n * V x K logits and n right categories of some rows (None: all), in their order, as many as fit."""
        size = max(1, _CHUNK_VALUES // (self.views * len(self.labels)))
        by_row = self.logits.reshape(-1, self.views, len(self.labels))
        for start in range(0, len(self) if rows is None else len(rows), size):
            part = slice(start, start + size) if rows is None else rows[start : start + size]
            yield np.ascontiguousarray(by_row[part]).reshape(-1, len(self.labels)), self.truth[part]

    def probabilities(self, temperature: float) -> Iterator[tuple[Floats, Categories]]:
        """n x K probabilities as the main job gives them at that temperature, and n right categories."""
        for logits, truth in self.chunks():
            yield mean_probabilities(logits, self.views, temperature), truth

    def outcomes(self, temperature: float) -> Outcomes:
        """The answers as the main job gives them at that temperature."""
        parts = [_outcomes(found, truth) for found, truth in self.probabilities(temperature)]
        predicted, probability, rank = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Outcomes(self.labels, self.truth, predicted, probability, rank)


def _outcomes(probabilities: Floats, truth: Categories) -> tuple[Categories, Floats, Categories]:
    predicted = probabilities.argmax(axis=1)
    rows = np.arange(len(truth))
    own = probabilities[rows, truth][:, None]
    # As in top_k, of equal probabilities the lower class index comes first.
    earlier = np.arange(probabilities.shape[1])[None] < truth[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & earlier)).sum(axis=1)
    return predicted.astype(np.int32), probabilities[rows, predicted], rank.astype(np.int32)


@contextmanager
def room_for_logits(rows: int, categories: int) -> Iterator[npt.NDArray[np.float32]]:
    """An array for rows x categories logits; a large one lies in a file of the temporary folder meanwhile.

    Raises:
        InputError: the temporary folder has not that much room.
    """
    needed = 4 * rows * categories
    if needed <= _IN_MEMORY_BYTES:
        yield np.empty((rows, categories), np.float32)
        return
    with tempfile.TemporaryDirectory(prefix="batchcls-logits-") as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise InputError(
                f"logits of {rows} rows x {categories} categories take {needed / 2**30:.1f} GiB and "
                f"{tempfile.gettempdir()} has {free / 2**30:.1f}; let TMPDIR name a larger disk, or use --limit"
            )
        yield np.memmap(Path(folder) / "logits", np.float32, "w+", shape=(rows, categories))


class Answering:
    """One walk over the manifest; `rows` and `failures` may be looked at from another thread meanwhile."""

    def __init__(self, labeled: LabeledManifest, labels: tuple[str, ...], engine: Engine) -> None:
        self._labeled = labeled
        self._labels = labels
        self._engine = engine
        self._passes: deque[list[int]] = deque()
        self._notes: list[pa.Table] = []
        self._waiting: deque[LabeledPart] = deque()
        self._kept: list[tuple[Rows, Categories]] = []
        self._failed: dict[int, str] = {}
        self.rows = 0
        self.failures: Counter[str] = Counter()

    def run(self, load: LoadSettings, room: Floats) -> tuple[pa.Table, Rows, LogitStore]:
        """Answer every row that has a label of the model.

        Args:
            load: `block_rows` is the most crops of a forward pass as well; nothing is kept, the engine normalizes.
            room: for the logits of all views of as many rows as the manifest has.

        Returns:
            `labeled.NOTES` of all rows; the numbers of the answered rows; their answers.

        Raises:
            InputError: not one row could be judged; the message has the reasons.
        """
        at, views = 0, load.views.count
        flags: list[npt.NDArray[np.bool_]] = [np.empty(0, bool)]
        for logits in self._logits(load):
            finite = np.asarray(np.isfinite(logits).reshape(-1, views * logits.shape[1]).all(axis=1))
            good = logits[np.repeat(finite, views)]
            room[at : at + len(good)] = good
            at += len(good)
            flags.append(finite)
        rows, truth = _joined(self._kept)
        finite = np.concatenate(flags)
        self._fail(dict.fromkeys(rows[~finite].tolist(), Reason.NON_FINITE.value))
        notes = with_failures(pa.concat_tables(self._notes).combine_chunks(), self._failed)
        if at == 0:
            raise InputError(nothing_judged(notes))
        return notes, rows[finite], LogitStore(self._labels, truth[finite], room[:at], views)

    def _logits(self, load: LoadSettings) -> Iterator[Floats]:
        """Of each block n * V x K, the views of an image next to each other: its crops, of each both flips."""
        found = predict_batches(self._engine, self._batches(Loader(load), load))
        for first in found:
            # The passes of a block follow each other; what it takes was noted before the first was submitted.
            answers = [first.logits]
            passes = self._passes.popleft()
            answers += [next(found).logits for _ in range(sum(passes) - 1)]
            ends = np.cumsum(passes)
            flips = [
                np.concatenate(answers[end - count : end]) for end, count in zip(ends, passes, strict=True)
            ]
            yield np.stack(flips, axis=1).reshape(-1, len(self._labels))

    def _batches(self, loader: Loader, load: LoadSettings) -> Iterator[npt.NDArray[np.uint8]]:
        for block in loader.load(self._tables(load.block_rows), {}):
            part = self._waiting.popleft()
            pixels = block.column(PIXELS).combine_chunks()
            good = pixels.is_valid().to_numpy(zero_copy_only=False)
            numbers = block.column(ROW).to_numpy()
            reasons = block.column("reason").to_pylist()
            self._fail({int(numbers[place]): reasons[place] for place in np.flatnonzero(~good)})
            self._kept.append((numbers[good], part.truth[good]))
            self.rows += part.notes.num_rows
            if not good.any():
                continue
            crops = pixels_of(pixels, load.preprocessing.shape)
            starts = range(0, len(crops), load.block_rows)
            seen = (crops, crops[:, :, ::-1]) if load.views.flips else (crops,)
            self._passes.append([len(starts)] * len(seen))
            for view in seen:
                for start in starts:
                    yield view[start : start + load.block_rows]

    def _tables(self, block_rows: int) -> Iterator[pa.Table]:
        for part in self._labeled.parts(self._labels, block_rows):
            self._notes.append(part.notes)
            if part.rows.num_rows:
                self._waiting.append(part)
                yield part.rows
            else:
                self.rows += part.notes.num_rows

    def _fail(self, failed: dict[int, str]) -> None:
        self._failed |= failed
        self.failures.update(failed.values())


def nothing_judged(notes: pa.Table) -> str:
    """Why there is nothing to evaluate, for an error."""
    reasons = Counter(notes.column("reason").drop_null().to_pylist()).most_common()
    named = notes.column("label").drop_null().unique().to_pylist()[:5]
    return (
        f"none of the {notes.num_rows} rows can be judged "
        f"({', '.join(f'{reason}={count}' for reason, count in reasons)}); labels of the manifest are "
        f"{', '.join(map(repr, named)) or 'all null'}: they have to be names of the model's categories"
    )


def _joined(kept: list[tuple[Rows, Categories]]) -> tuple[Rows, Categories]:
    rows, truth = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for numbers, categories in kept:
        rows.append(numbers)
        truth.append(categories)
    return np.concatenate(rows), np.concatenate(truth)
