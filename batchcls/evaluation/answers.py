"""Logits of labelled rows, in memory or on disk, and what they say at a temperature.

Letters: N rows, V views of each image, K categories.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchcls.errors import InputError
from batchcls.evaluation.outcomes import Categories, Floats, Outcomes, Rows
from batchcls.inference.average import mean_probabilities

_CHUNK_VALUES = 4_194_304  # 16 MiB of logits at a time
_IN_MEMORY_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class Answers:
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
