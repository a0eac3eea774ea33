"""A cascade as one predictor: a small network predicts every row, and a large one those below a confidence."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.inference.predictor import Predictor
from batchcls.inference.predictor_config import PredictSettings
from batchcls.schema import LARGE_PIXELS, LARGE_PREDICT_SECONDS, PIXELS, PREDICT_SECONDS, loaded_schema

_FULL_BATCHES = 8  # of the large network; the last batch of a group is not full, which is an eighth at most
_MAX_BLOCKS = (
    16  # of a group, so that progress is reported and errors are found also where few rows are uncertain
)


class BlockPredictor(Protocol):
    """Predicts blocks of decoded images, with one network or several."""

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return a block of `schema.classified_schema` for one of `schema.loaded_schema`: same rows, same order."""

    def stream(self, blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield blocks of `schema.classified_schema` for those of `schema.loaded_schema`: same rows, same order."""


@dataclass(frozen=True, slots=True)
class _UncertainRows:
    """A block that the small network has predicted.

    Attributes:
        predicted: the block.
        rows: positions of the rows that the large network predicts.
        inputs: these rows with the pixels for the large network, with `schema.loaded_schema`.
    """

    predicted: pa.Table
    rows: npt.NDArray[np.int64]
    inputs: pa.Table


class CascadePredictor:
    """Sends the rows whose confidence is below the threshold of their class from a small to a large network.

    The networks run alternately: the small one predicts blocks until several batches for the large one are full, or
    until there are no more blocks. So each of them uses all threads, and their times can be measured separately.
    """

    def __init__(
        self, small: Predictor, large: Predictor, large_settings: PredictSettings, thresholds: Sequence[float]
    ) -> None:
        """Initialize the predictor.

        Args:
            small: predicts every row; its embedding is that of the row in any case.
            large: predicts the rows below their threshold.
            large_settings: settings of `large`, without embedding and kept columns.
            thresholds: for each class of `small` after the label map.
        """
        self._small = small
        self._large = large
        self._columns = ["reason", "detail", *(field.name for field in large_settings.prediction_fields)]
        self._thresholds = np.array(thresholds, np.float32)
        self._group_rows = _FULL_BATCHES * large_settings.batch_size

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return a block of `schema.classified_schema` for one of `schema.loaded_schema`: same rows, same order."""
        (predicted,) = self.stream([block])
        return predicted

    def stream(self, blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield blocks of `schema.classified_schema` for those of `schema.loaded_schema`: same rows, same order.

        The column LARGE_PREDICT_SECONDS is added at the end.
        """
        remaining = iter(blocks)
        while group := self._predict_small(remaining):
            yield from self._complete(group)

    def _predict_small(self, blocks: Iterator[pa.Table]) -> list[_UncertainRows]:
        """Predict the next blocks, until enough rows are uncertain; nothing if there are no more blocks."""
        group: list[_UncertainRows] = []
        submitted: deque[pa.Table] = deque()
        uncertain = 0

        def next_blocks() -> Iterator[pa.Table]:
            while uncertain < self._group_rows and len(group) + len(submitted) < _MAX_BLOCKS:
                block = next(blocks, None)
                if block is None:
                    return
                submitted.append(block)
                yield block.drop_columns([LARGE_PIXELS]) if LARGE_PIXELS in block.column_names else block

        for predicted in self._small.stream(next_blocks()):
            rows = self._uncertain_rows(predicted)
            group.append(_UncertainRows(predicted, rows, _inputs(submitted.popleft(), rows)))
            uncertain += len(rows)
        return group

    def _uncertain_rows(self, predicted: pa.Table) -> npt.NDArray[np.int64]:
        """Return the positions of the predicted rows below the threshold of their best class."""
        has_prediction = predicted.column("probability").is_valid().to_numpy()
        rows: npt.NDArray[np.int64] = np.flatnonzero(has_prediction).astype(np.int64)
        found = predicted.select(["probability", "top_k"]).take(pa.array(rows))
        best = pc.struct_field(pc.list_element(found.column("top_k"), 0), "class_index").to_numpy()
        is_uncertain = found.column("probability").to_numpy() < self._thresholds[best.astype(np.int64)]
        uncertain: npt.NDArray[np.int64] = rows[is_uncertain]
        return uncertain

    def _complete(self, group: list[_UncertainRows]) -> Iterator[pa.Table]:
        """Predict the uncertain rows of a group in full batches, and yield its blocks."""
        inputs = pa.concat_tables([entry.inputs for entry in group]).combine_chunks()
        large = self._large(inputs) if inputs.num_rows else None
        first = 0
        for entry in group:
            part = None if large is None else large.slice(first, len(entry.rows))
            first += len(entry.rows)
            yield _with_predictions(entry.predicted, entry.rows, part, self._columns)


def _inputs(block: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Return rows of a loaded block with the pixels for the large network, without kept columns."""
    schema = loaded_schema()
    pixels = LARGE_PIXELS if LARGE_PIXELS in block.column_names else PIXELS
    names = [pixels if name == PIXELS else name for name in schema.names]
    return block.select(names).take(pa.array(rows)).rename_columns(schema.names).cast(schema)


def _with_predictions(
    predicted: pa.Table, rows: npt.NDArray[np.int64], large: pa.Table | None, columns: Sequence[str]
) -> pa.Table:
    """Return a predicted block with these columns of the large network's rows in some of its rows."""
    seconds = np.zeros(predicted.num_rows, np.float32)
    if large is not None and len(rows):
        seconds[rows] = large.column(PREDICT_SECONDS).to_numpy()
        source = np.arange(predicted.num_rows)
        source[rows] = np.arange(predicted.num_rows, predicted.num_rows + len(rows))
        merged = pa.concat_tables([predicted.select(columns), large.select(columns)]).take(pa.array(source))
        for name in columns:
            index = predicted.schema.get_field_index(name)
            predicted = predicted.set_column(index, predicted.schema.field(index), merged.column(name))
    return predicted.append_column(LARGE_PREDICT_SECONDS, pa.array(seconds, pa.float32()))
