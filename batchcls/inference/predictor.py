"""Blocks with pixels in, the same rows with answers out."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.inference.postprocess import Averaged, Floats, TopK, average, embedding_column
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.engines.engine import Engine, EngineOutput, PendingOutput
from batchcls.schema import (
    PIXELS,
    PREDICT_SECONDS,
    REASONS,
    Reason,
    answer_fields,
)

_INPUT_TYPES: dict[str, type[np.generic]] = {"engine": np.uint8, "worker": np.float32}


class _Submitted:
    """One forward pass: with the engine at first, then its answer."""

    def __init__(self, pending: PendingOutput) -> None:
        self._pending: PendingOutput | None = pending
        self._answer: EngineOutput | None = None

    def collect(self) -> EngineOutput:
        """Wait for the answer; a second call has it at once."""
        if self._pending is not None:
            self._answer = self._pending.result()
            self._pending = None
        assert self._answer is not None
        return self._answer


@dataclass(frozen=True, slots=True)
class _Begun:
    """A record batch without its pixels, whose forward passes have been submitted.

    `good` are the rows that had pixels; `passes` has one list for each flip of their crops.
    """

    batch: pa.RecordBatch
    good: npt.NDArray[np.int64]
    passes: list[list[_Submitted]]


class Predictor:
    """Answers the good rows of blocks and passes the failed ones through.

    While the answers of one block are put into columns the engine has work of the next one.
    """

    def __init__(
        self, engine: Engine, settings: PredictSettings, busy: Callable[[], float] = time.process_time
    ) -> None:
        """Take an engine.

        Args:
            engine: what answers; nobody else may use it while a stream is read.
            settings: of the job.
            busy: seconds that the network has worked so far, on a CPU or a GPU.
        """
        self._engine = engine
        self._settings = settings
        self._top_k = TopK(settings.labels, settings.top_k)
        self._busy = busy

    def __call__(self, block: pa.Table) -> pa.Table:
        """Block of `schema.loaded_schema` -> block of `schema.classified_schema`, same rows, same order."""
        (answered,) = self.stream([block])
        return answered

    def stream(self, blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Blocks of `schema.loaded_schema` -> blocks of `schema.classified_schema`, same rows, same order.

        A row whose logits or embedding are not finite fails with `non_finite`.
        """
        before = self._busy()
        in_flight: deque[_Submitted] = deque(maxlen=self._engine.in_flight)
        waiting: deque[list[_Begun]] = deque()
        for block in blocks:
            waiting.append([self._begin(batch, in_flight) for batch in block.to_batches() if batch.num_rows])
            if len(waiting) > 1:
                answered, before = self._finished(waiting.popleft(), before)
                yield answered
        while waiting:
            answered, before = self._finished(waiting.popleft(), before)
            yield answered

    def _begin(self, batch: pa.RecordBatch, in_flight: deque[_Submitted]) -> _Begun:
        kind = _INPUT_TYPES[self._settings.normalize]
        pixels = pixels_of(batch.column(PIXELS), self._settings.input_shape, kind)
        seen = [pixels, pixels[:, :, ::-1]] if self._settings.views.flips else [pixels]
        good = np.flatnonzero(batch.column(PIXELS).is_valid().to_numpy(zero_copy_only=False))
        return _Begun(batch.drop_columns([PIXELS]), good, [self._submit(view, in_flight) for view in seen])

    def _submit(self, pixels: npt.NDArray[np.generic], in_flight: deque[_Submitted]) -> list[_Submitted]:
        """Forward passes of at most `batch_size` inputs; the engine never has more than keep it busy."""
        size = self._settings.batch_size
        submitted = []
        for start in range(0, len(pixels), size):
            if len(in_flight) == in_flight.maxlen:
                in_flight[0].collect()
            submitted.append(_Submitted(self._engine.submit(pixels[start : start + size])))
            in_flight.append(submitted[-1])
        return submitted

    def _finished(self, parts: list[_Begun], before: float) -> tuple[pa.Table, float]:
        """The block that these record batches were, and the engine's busy seconds so far."""
        schema = self._settings.output_schema
        index = schema.get_field_index(PREDICT_SECONDS)
        table = pa.Table.from_batches([self._classified(part) for part in parts], schema.remove(index))
        now = self._busy()
        seconds = np.full(table.num_rows, max(0.0, now - before) / max(1, table.num_rows), np.float32)
        return table.append_column(schema.field(index), pa.array(seconds)), now

    def _classified(self, part: _Begun) -> pa.RecordBatch:
        rest, good = part.batch, part.good
        found = self._average(part.passes)
        finite = found.finite
        if not finite.all():
            rest = _fail(rest, good[~finite])
        # Row r of the batch takes the answer places[r]; a failed row takes a null.
        places = np.full(rest.num_rows, -1, np.int64)
        places[good[finite]] = np.arange(int(finite.sum()))
        taken = pa.array(places, mask=places < 0)
        answers = self._columns(found.probabilities[finite], found.embedding[finite])
        settings = self._settings
        for field in answer_fields(
            settings.embedding, settings.embedding_dimension, abstain=settings.abstention is not None
        ):
            rest = rest.append_column(field, answers[field.name].take(taken))
        return rest

    def _columns(self, probabilities: Floats, embedding: Floats) -> dict[str, pa.Array]:
        columns = self._top_k.columns(probabilities)
        if self._settings.abstention is not None:
            columns = self._settings.abstention.columns(columns, probabilities)
        if self._settings.embedding is not None:
            columns["embedding"] = embedding_column(embedding, self._settings.embedding)
        return columns

    def _average(self, passes: list[list[_Submitted]]) -> Averaged:
        """Answers to all views, averaged for each image."""
        settings = self._settings
        widths = (len(settings.labels), settings.embedding_dimension)
        answers = [_joined([one.collect() for one in submitted], widths) for submitted in passes]
        # Views of an image stand next to each other: its crops, and of each crop both flips.
        answer = EngineOutput(
            np.stack([one.logits for one in answers], axis=1).reshape(-1, widths[0]),
            np.stack([one.embedding for one in answers], axis=1).reshape(-1, widths[1]),
        )
        return average(
            answer,
            settings.views.count,
            l2_normalize=settings.l2_normalize,
            temperature=settings.temperature,
        )


def pixels_of(
    column: pa.Array, shape: tuple[int, int, int], kind: type[np.generic] = np.uint8
) -> npt.NDArray[Any]:
    """All crops of the good rows of a `pixels` column as N x H x W x 3, read from Arrow's buffer without a copy."""
    _, offset_buffer, values = column.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    data = np.frombuffer(values, np.uint8)[offsets[0] : offsets[-1]] if values else np.empty(0, np.uint8)
    return data.view(kind).reshape(-1, *shape)


def _joined(answers: list[EngineOutput], widths: tuple[int, int]) -> EngineOutput:
    """Answers to the parts of a batch as one; `widths` are those of logits and embedding, for no part at all."""
    if not answers:
        return EngineOutput(*(np.empty((0, width), np.float32) for width in widths))
    if len(answers) == 1:
        return answers[0]
    return EngineOutput(
        np.concatenate([answer.logits for answer in answers]),
        np.concatenate([answer.embedding for answer in answers]),
    )


def _fail(batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
    failed = np.zeros(batch.num_rows, bool)
    failed[rows] = True
    texts = {"reason": Reason.NON_FINITE.value, "detail": REASONS[Reason.NON_FINITE].meaning}
    for name, text in texts.items():
        index = batch.schema.get_field_index(name)
        column = pc.if_else(pa.array(failed), pa.scalar(text, pa.string()), batch.column(index))
        batch = batch.set_column(index, batch.schema.field(index), column)
    return batch
