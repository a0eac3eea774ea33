"""The predictor on loaded blocks, with an engine whose outputs are easy to verify."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest

from batchcls.images.loader import pack_pixels
from batchcls.inference.predictor import Predictor
from batchcls.inference.predictor_config import PredictSettings
from batchcls.models.engines.engine import EngineOutput
from batchcls.preprocessing import Views
from batchcls.schema import loaded_schema

SHAPE = (2, 2, 3)


@dataclass
class MeanEngine:
    """Class = mean of the pixels; embedding = (mean, red of the first pixel). An image of 255s gives NaN."""

    device: str = "cpu"
    precision: str = "fp32"
    largest_batch: int = 0
    in_flight: int = 2
    outstanding: int = 0
    order: list[int] = field(default_factory=list)

    def submit(self, pixels: np.ndarray[Any, Any]) -> "MeanOutput":
        self.outstanding += 1
        assert self.outstanding <= self.in_flight, "submit would block forever"
        self.order.append(int(pixels[0, 0, 0, 0]))
        return MeanOutput(self, self.predict(pixels))

    def predict(self, pixels: np.ndarray[Any, Any]) -> EngineOutput:
        self.largest_batch = max(self.largest_batch, len(pixels))
        means = pixels.reshape(len(pixels), -1).astype(np.float32).mean(axis=1)
        logits = -np.abs(np.arange(10, dtype=np.float32)[None] - means[:, None])
        logits[means == 255] = np.nan
        return EngineOutput(logits, np.stack([means, pixels[:, 0, 0, 0].astype(np.float32)], axis=1))


@dataclass
class MeanOutput:
    """A pending output that occupies the engine until its result is read."""

    engine: MeanEngine
    output: EngineOutput

    def result(self) -> EngineOutput:
        self.engine.outstanding -= 1
        return self.output


def settings(normalize: Literal["engine", "worker"] = "engine", batch_size: int = 4) -> PredictSettings:
    labels = tuple(str(i) for i in range(10))
    return PredictSettings(
        labels,
        3,
        pa.float32(),
        2,
        False,
        Views(),
        SHAPE,
        normalize,
        batch_size,
        (pa.field("shop", pa.string()),),
    )


def block(values: list[int | None], dtype: type[np.generic] = np.uint8, first_row: int = 0) -> pa.Table:
    """Return a block with one image per value, whose pixels all have this value; None is a failed row."""
    images = [None if v is None else np.full(SHAPE, v, dtype) for v in values]
    n = len(values)
    columns = {
        "row": pa.array(range(first_row, first_row + n), pa.int64()),
        "item_id": pa.array([f"id{first_row + i}" for i in range(n)]),
        "uri": pa.nulls(n, pa.string()),
        "shop": pa.array([f"s{i}" for i in range(n)]),
        "width": pa.nulls(n, pa.int32()),
        "height": pa.nulls(n, pa.int32()),
        "content_hash": pa.nulls(n, pa.string()),
        "source_version": pa.nulls(n, pa.string()),
        "n_bytes": pa.nulls(n, pa.int64()),
        "attempts": pa.array([1] * n, pa.int32()),
        "reason": pa.array(["truncated" if v is None else None for v in values], pa.string()),
        "detail": pa.array([None] * n, pa.string()),
        "fetch_seconds": pa.array([0.0] * n, pa.float32()),
        "decode_seconds": pa.array([0.0] * n, pa.float32()),
        "pixels": pack_pixels(images),
    }
    return pa.table(columns, schema=loaded_schema((pa.field("shop", pa.string()),)))


def labels(table: pa.Table) -> list[str | None]:
    return table.column("label").to_pylist()


def test_predictions_match_rows_between_failed_rows():
    predicted = Predictor(MeanEngine(), settings())(block([None, 3, None, 7, 1, None]))
    assert labels(predicted) == [None, "3", None, "7", "1", None]
    assert predicted.column("embedding").to_pylist() == [None, [3, 3], None, [7, 7], [1, 1], None]
    assert predicted.column("item_id").to_pylist() == [f"id{i}" for i in range(6)]
    assert predicted.schema.equals(settings().output_schema)


def test_chunked_and_sliced_blocks_are_predicted():
    joined = pa.concat_tables(
        [block([1, None, 2]), block([None, 5], first_row=3), block([6, 7, 8], first_row=5)]
    )
    predicted = Predictor(MeanEngine(), settings())(joined.slice(1, 6))
    assert labels(predicted) == [None, "2", None, "5", "6", "7"]


def test_no_forward_pass_exceeds_batch_size():
    engine = MeanEngine()
    predicted = Predictor(engine, settings(batch_size=4))(block([i % 9 for i in range(11)]))
    assert engine.largest_batch == 4
    assert labels(predicted) == [str(i % 9) for i in range(11)]


def test_block_of_failed_rows_passes_through():
    predicted = Predictor(MeanEngine(), settings())(block([None, None]))
    assert labels(predicted) == [None, None]
    assert predicted.column("reason").to_pylist() == ["truncated", "truncated"]


def test_outputs_that_are_not_finite_fail_only_their_row():
    predicted = Predictor(MeanEngine(), settings())(block([2, 255, None, 4]))
    assert labels(predicted) == ["2", None, None, "4"]
    assert predicted.column("reason").to_pylist() == [None, "non_finite", "truncated", None]


def test_normalized_pixels_are_float32():
    predicted = Predictor(MeanEngine(), settings("worker"))(block([2, None, 4], np.float32))
    assert labels(predicted) == ["2", None, "4"]


def test_pixels_are_not_copied():
    table = block([1, 2])
    addresses: list[int] = []

    class RecordingEngine(MeanEngine):
        def predict(self, pixels: np.ndarray[Any, Any]) -> EngineOutput:
            addresses.append(pixels.__array_interface__["data"][0])
            return super().predict(pixels)

    Predictor(RecordingEngine(), settings())(table)
    assert addresses == [table.column("pixels").chunk(0).buffers()[2].address]


def test_embedding_column_is_optional():
    without_embedding = replace(settings(), embedding=None)
    assert "embedding" not in Predictor(MeanEngine(), without_embedding)(block([1])).column_names


@pytest.mark.parametrize("images", [[], [None], [np.zeros(SHAPE, np.uint8)]])
def test_packed_pixels_are_valid_arrow(images: list[Any]):
    packed = pack_pixels(images)
    packed.validate(full=True)
    assert packed.null_count == sum(image is None for image in images)


def test_stream_submits_next_block_early_and_keeps_order():
    engine = MeanEngine()
    blocks = [
        block([0, None, 1, 2, 3, 4], first_row=0),
        block([None, None], first_row=6),
        block([5, 6, 7, 8, 9], first_row=8),
    ]
    stream = Predictor(engine, settings(batch_size=2)).stream(iter(blocks))
    first = next(stream)
    # The second block is submitted before the first is returned, but it has no images.
    assert engine.order == [0, 2, 4]
    predicted = pa.concat_tables([first, *stream])
    assert predicted.column("row").to_pylist() == list(range(13))
    assert predicted.column("label").to_pylist() == [
        *("0", None, "1", "2", "3", "4"),
        *(None, None),
        *("5", "6", "7", "8", "9"),
    ]
    assert engine.outstanding == 0


def test_predict_seconds_of_a_stream_sum_to_busy_time():
    ticks = iter([10.0, 13.0, 17.0])
    predictor = Predictor(MeanEngine(), settings(), busy=lambda: next(ticks))
    predicted = list(predictor.stream([block([1, 2]), block([3, None, 5, 6], first_row=2)]))
    seconds = [sum(table.column("predict_seconds").to_pylist()) for table in predicted]
    assert seconds == pytest.approx([3.0, 4.0])
