"""A block with pixels in, the same rows with answers out."""

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.inference.average import Averaged, Floats, average
from batchcls.inference.topk import TopK, embedding_column
from batchcls.models.engines import Answer, Engine
from batchcls.schema import (
    PIXELS,
    PREDICT_SECONDS,
    REASONS,
    Reason,
    answer_fields,
    classified_schema,
)
from batchcls.views import Views

_INPUT_TYPES: dict[str, type[np.generic]] = {"engine": np.uint8, "worker": np.float32}


@dataclass(frozen=True, slots=True)
class PredictSettings:
    """What the predictor needs beside an engine.

    `embedding` is halffloat, float or None for no column; `input_shape` is H, W, C of a crop;
    `batch_size` counts inputs of a forward pass, so an image with ten views counts ten times.
    """

    labels: tuple[str, ...]
    top_k: int
    embedding: pa.DataType | None
    embedding_dimension: int
    l2_normalize: bool
    views: Views
    input_shape: tuple[int, int, int]
    normalize: Literal["engine", "worker"]
    batch_size: int
    kept: tuple[pa.Field, ...]

    @property
    def output_schema(self) -> pa.Schema:
        """Schema of the blocks that the predictor returns."""
        return classified_schema(self.kept, self.embedding, self.embedding_dimension)


class Predictor:
    """Answers the good rows of a block and passes the failed ones through."""

    def __init__(self, engine: Engine, settings: PredictSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._top_k = TopK(settings.labels, settings.top_k)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Block of `schema.loaded_schema` -> block of `schema.classified_schema`, same rows, same order.

        A row whose logits or embedding are not finite fails with `non_finite`.
        """
        started = time.perf_counter()
        parts = [self._classify(batch) for batch in block.to_batches() if batch.num_rows]
        answered = pa.Table.from_batches(parts, self._settings.output_schema.remove(self._seconds_field()))
        seconds = (time.perf_counter() - started) / max(1, block.num_rows)
        column = pa.array(np.full(block.num_rows, seconds, np.float32))
        return answered.append_column(self._settings.output_schema.field(PREDICT_SECONDS), column)

    def _seconds_field(self) -> int:
        return int(self._settings.output_schema.get_field_index(PREDICT_SECONDS))

    def _classify(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        pixels = self._pixels(batch.column(PIXELS))
        rest = batch.drop_columns([PIXELS])
        good = np.flatnonzero(batch.column(PIXELS).is_valid().to_numpy(zero_copy_only=False))
        found = self._answer(pixels)
        finite = found.finite
        if not finite.all():
            rest = _fail(rest, good[~finite])
        # Row r of the batch takes the answer places[r]; a failed row takes a null.
        places = np.full(batch.num_rows, -1, np.int64)
        places[good[finite]] = np.arange(int(finite.sum()))
        taken = pa.array(places, mask=places < 0)
        answers = self._columns(found.probabilities[finite], found.embedding[finite])
        fields = answer_fields(self._settings.embedding, self._settings.embedding_dimension)
        for field in fields:
            rest = rest.append_column(field, answers[field.name].take(taken))
        return rest

    def _columns(self, probabilities: Floats, embedding: Floats) -> dict[str, pa.Array]:
        columns = self._top_k.columns(probabilities)
        if self._settings.embedding is not None:
            columns["embedding"] = embedding_column(embedding, self._settings.embedding)
        return columns

    def _pixels(self, column: pa.Array) -> npt.NDArray[np.generic]:
        """All crops of the good rows as N x H x W x 3, read from Arrow's buffer without a copy."""
        _, offset_buffer, values = column.buffers()
        offsets = np.frombuffer(offset_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
        kind = _INPUT_TYPES[self._settings.normalize]
        data = np.frombuffer(values, np.uint8)[offsets[0] : offsets[-1]] if values else np.empty(0, np.uint8)
        return data.view(kind).reshape(-1, *self._settings.input_shape)

    def _answer(self, pixels: npt.NDArray[np.generic]) -> Averaged:
        """Answers to all views, averaged for each image."""
        views = self._settings.views
        seen = [pixels, pixels[:, :, ::-1]] if views.flips else [pixels]
        passes = [self._forward(view) for view in seen]
        # Views of an image stand next to each other: its crops, and of each crop both flips.
        answer = Answer(
            np.stack([one.logits for one in passes], axis=1).reshape(-1, passes[0].logits.shape[1]),
            np.stack([one.embedding for one in passes], axis=1).reshape(-1, passes[0].embedding.shape[1]),
        )
        return average(answer, views.count, l2_normalize=self._settings.l2_normalize)

    def _forward(self, pixels: npt.NDArray[np.generic]) -> Answer:
        """Forward passes of at most `batch_size` inputs."""
        size = self._settings.batch_size
        if len(pixels) == 0:
            return Answer(
                np.empty((0, len(self._settings.labels)), np.float32),
                np.empty((0, self._settings.embedding_dimension), np.float32),
            )
        answers = [self._engine.answer(pixels[start : start + size]) for start in range(0, len(pixels), size)]
        if len(answers) == 1:
            return answers[0]
        return Answer(
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
