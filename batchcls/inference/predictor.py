"""Prediction of blocks of decoded images: the pixels of each row are replaced by its prediction."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.inference.postprocess import AveragedOutput, PredictionColumns
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.engines.engine import Engine, EngineOutput, PendingOutput
from batchcls.schema import (
    PIXELS,
    PREDICT_SECONDS,
    REASONS,
    Reason,
)

_INPUT_TYPES: dict[str, type[np.generic]] = {"engine": np.uint8, "worker": np.float32}


class _Submitted:
    """A forward pass that was submitted to the engine, and later its output."""

    def __init__(self, pending: PendingOutput) -> None:
        self._pending: PendingOutput | None = pending
        self._output: EngineOutput | None = None

    def collect(self) -> EngineOutput:
        """Wait for the output; a second call returns it immediately."""
        if self._pending is not None:
            self._output = self._pending.result()
            self._pending = None
        assert self._output is not None
        return self._output


@dataclass(frozen=True, slots=True)
class _SubmittedBatch:
    """A record batch without its pixels, whose forward passes were submitted.

    `good` are the rows that had pixels; `passes` has one list for each flip of their crops.
    """

    batch: pa.RecordBatch
    good: npt.NDArray[np.int64]
    passes: list[list[_Submitted]]


class Predictor:
    """Predicts the good rows of blocks and passes the failed rows through.

    While the outputs of one block are converted to columns, the engine runs the next block.
    """

    def __init__(
        self, engine: Engine, settings: PredictSettings, busy: Callable[[], float] = time.process_time
    ) -> None:
        """Initialize the predictor.

        Args:
            engine: used by nothing else while a stream is read.
            settings: settings of the predictions.
            busy: returns the seconds that the network has been busy so far, on a CPU or a GPU.
        """
        self._engine = engine
        self._settings = settings
        self._columns = PredictionColumns(settings)
        self._busy = busy

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return a block of `schema.classified_schema` for one of `schema.loaded_schema`: same rows, same order."""
        (predicted,) = self.stream([block])
        return predicted

    def stream(self, blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield blocks of `schema.classified_schema` for those of `schema.loaded_schema`: same rows, same order.

        A row whose logits or embedding are not finite fails with `non_finite`.
        """
        busy_seconds = self._busy()
        in_flight: deque[_Submitted] = deque(maxlen=self._engine.in_flight)
        pending: deque[list[_SubmittedBatch]] = deque()
        for block in blocks:
            pending.append(
                [self._submit_batch(batch, in_flight) for batch in block.to_batches() if batch.num_rows]
            )
            if len(pending) > 1:
                predicted, busy_seconds = self._collect_block(pending.popleft(), busy_seconds)
                yield predicted
        while pending:
            predicted, busy_seconds = self._collect_block(pending.popleft(), busy_seconds)
            yield predicted

    def _submit_batch(self, batch: pa.RecordBatch, in_flight: deque[_Submitted]) -> _SubmittedBatch:
        kind = _INPUT_TYPES[self._settings.normalize]
        pixels = pixels_of(batch.column(PIXELS), self._settings.input_shape, kind)
        flips = [pixels, pixels[:, :, ::-1]] if self._settings.views.flips else [pixels]
        good = np.flatnonzero(batch.column(PIXELS).is_valid().to_numpy(zero_copy_only=False))
        return _SubmittedBatch(
            batch.drop_columns([PIXELS]), good, [self._submit(view, in_flight) for view in flips]
        )

    def _submit(self, pixels: npt.NDArray[np.generic], in_flight: deque[_Submitted]) -> list[_Submitted]:
        """Submit passes of at most `batch_size` inputs; the engine never holds more than `in_flight`."""
        size = self._settings.batch_size
        submitted = []
        for start in range(0, len(pixels), size):
            if len(in_flight) == in_flight.maxlen:
                in_flight[0].collect()
            submitted.append(_Submitted(self._engine.submit(pixels[start : start + size])))
            in_flight.append(submitted[-1])
        return submitted

    def _collect_block(self, batches: list[_SubmittedBatch], before: float) -> tuple[pa.Table, float]:
        """Return the block of these record batches with its predictions, and the busy seconds so far."""
        schema = self._settings.output_schema
        index = schema.get_field_index(PREDICT_SECONDS)
        table = pa.Table.from_batches(
            [self._add_predictions(batch) for batch in batches], schema.remove(index)
        )
        now = self._busy()
        seconds = np.full(table.num_rows, max(0.0, now - before) / max(1, table.num_rows), np.float32)
        return table.append_column(schema.field(index), pa.array(seconds)), now

    def _add_predictions(self, submitted: _SubmittedBatch) -> pa.RecordBatch:
        batch, good = submitted.batch, submitted.good
        averaged = self._average(submitted.passes)
        finite = averaged.finite
        if not finite.all():
            batch = _fail(batch, good[~finite])
        # Row r of the batch takes the prediction indices[r]; a failed row takes a null.
        indices = np.full(batch.num_rows, -1, np.int64)
        indices[good[finite]] = np.arange(int(finite.sum()))
        take = pa.array(indices, mask=indices < 0)
        columns = self._columns.columns(averaged.probabilities[finite], averaged.embedding[finite])
        for field in self._settings.prediction_fields:
            batch = batch.append_column(field, columns[field.name].take(take))
        return batch

    def _average(self, passes: list[list[_Submitted]]) -> AveragedOutput:
        """Average the outputs of all views of each image."""
        settings = self._settings
        widths = (settings.classes, settings.embedding_dimension)
        outputs = [
            EngineOutput.concatenate([submitted.collect() for submitted in flip])
            if flip
            else EngineOutput.empty(widths)
            for flip in passes
        ]
        # Views of an image are adjacent: its crops, and both flips of each crop.
        output = EngineOutput(
            np.stack([flip.logits for flip in outputs], axis=1).reshape(-1, widths[0]),
            np.stack([flip.embedding for flip in outputs], axis=1).reshape(-1, widths[1]),
        )
        return self._columns.average(output)


def pixels_of(
    column: pa.Array, shape: tuple[int, int, int], kind: type[np.generic] = np.uint8
) -> npt.NDArray[Any]:
    """Return all crops of the good rows of a `pixels` column as N x H x W x 3, without copying Arrow's buffer."""
    _, offset_buffer, values = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(values, np.uint8)[offsets[0] : offsets[-1]] if values else np.empty(0, np.uint8)
    return data.view(kind).reshape(-1, *shape)


def _fail(batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Set reason and detail of rows whose outputs are not finite."""
    failed = np.zeros(batch.num_rows, bool)
    failed[rows] = True
    texts = {"reason": Reason.NON_FINITE.value, "detail": REASONS[Reason.NON_FINITE].meaning}
    for name, text in texts.items():
        index = batch.schema.get_field_index(name)
        column = pc.if_else(pa.array(failed), pa.scalar(text, pa.string()), batch.column(index))
        batch = batch.set_column(index, batch.schema.field(index), column)
    return batch
