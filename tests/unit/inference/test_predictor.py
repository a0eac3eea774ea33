"""The predictor on blocks as load makes them, with an engine that can be checked by hand."""

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

    def submit(self, pixels: np.ndarray[Any, Any]) -> "Later":
        self.outstanding += 1
        assert self.outstanding <= self.in_flight, "it would wait for ever"
        self.order.append(int(pixels[0, 0, 0, 0]))
        return Later(self, self.predict(pixels))

    def predict(self, pixels: np.ndarray[Any, Any]) -> EngineOutput:
        self.largest_batch = max(self.largest_batch, len(pixels))
        means = pixels.reshape(len(pixels), -1).astype(np.float32).mean(axis=1)
        logits = -np.abs(np.arange(10, dtype=np.float32)[None] - means[:, None])
        logits[means == 255] = np.nan
        return EngineOutput(logits, np.stack([means, pixels[:, 0, 0, 0].astype(np.float32)], axis=1))


@dataclass
class Later:
    """Its place is free again only when somebody has taken the answer."""

    engine: MeanEngine
    found: EngineOutput

    def result(self) -> EngineOutput:
        self.engine.outstanding -= 1
        return self.found


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
    """One image a value, all its pixels of that value; None is a failed row."""
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


def test_every_answer_stays_with_its_row_between_failed_ones():
    answered = Predictor(MeanEngine(), settings())(block([None, 3, None, 7, 1, None]))
    assert labels(answered) == [None, "3", None, "7", "1", None]
    assert answered.column("embedding").to_pylist() == [None, [3, 3], None, [7, 7], [1, 1], None]
    assert answered.column("item_id").to_pylist() == [f"id{i}" for i in range(6)]
    assert answered.schema.equals(settings().output_schema)


def test_a_block_of_several_chunks_and_slices_is_read_right():
    joined = pa.concat_tables(
        [block([1, None, 2]), block([None, 5], first_row=3), block([6, 7, 8], first_row=5)]
    )
    answered = Predictor(MeanEngine(), settings())(joined.slice(1, 6))
    assert labels(answered) == [None, "2", None, "5", "6", "7"]


def test_the_network_sees_no_more_than_a_batch_at_once():
    engine = MeanEngine()
    answered = Predictor(engine, settings(batch_size=4))(block([i % 9 for i in range(11)]))
    assert engine.largest_batch == 4
    assert labels(answered) == [str(i % 9) for i in range(11)]


def test_a_block_without_one_good_image_passes_through():
    answered = Predictor(MeanEngine(), settings())(block([None, None]))
    assert labels(answered) == [None, None]
    assert answered.column("reason").to_pylist() == ["truncated", "truncated"]


def test_answers_that_are_not_finite_fail_their_row_only():
    answered = Predictor(MeanEngine(), settings())(block([2, 255, None, 4]))
    assert labels(answered) == ["2", None, None, "4"]
    assert answered.column("reason").to_pylist() == [None, "non_finite", "truncated", None]


def test_normalized_pixels_travel_as_float32():
    answered = Predictor(MeanEngine(), settings("worker"))(block([2, None, 4], np.float32))
    assert labels(answered) == ["2", None, "4"]


def test_pixels_are_read_in_place():
    table = block([1, 2])
    seen: list[int] = []

    class Watching(MeanEngine):
        def predict(self, pixels: np.ndarray[Any, Any]) -> EngineOutput:
            seen.append(pixels.__array_interface__["data"][0])
            return super().predict(pixels)

    Predictor(Watching(), settings())(table)
    assert seen == [table.column("pixels").chunk(0).buffers()[2].address]


def test_without_an_embedding_column_none_is_written():
    bare = replace(settings(), embedding=None)
    assert "embedding" not in Predictor(MeanEngine(), bare)(block([1])).column_names


@pytest.mark.parametrize("images", [[], [None], [np.zeros(SHAPE, np.uint8)]])
def test_packed_pixels_have_no_gaps(images: list[Any]):
    packed = pack_pixels(images)
    packed.validate(full=True)
    assert packed.null_count == sum(image is None for image in images)


def test_a_stream_keeps_the_engine_busy_with_the_next_block_and_every_answer_in_its_place():
    engine = MeanEngine()
    blocks = [
        block([0, None, 1, 2, 3, 4], first_row=0),
        block([None, None], first_row=6),
        block([5, 6, 7, 8, 9], first_row=8),
    ]
    stream = Predictor(engine, settings(batch_size=2)).stream(iter(blocks))
    first = next(stream)
    # Before the first block is out, the second one has been begun: here it had nothing to submit.
    assert engine.order == [0, 2, 4]
    answered = pa.concat_tables([first, *stream])
    assert answered.column("row").to_pylist() == list(range(13))
    assert answered.column("label").to_pylist() == [
        *("0", None, "1", "2", "3", "4"),
        *(None, None),
        *("5", "6", "7", "8", "9"),
    ]
    assert engine.outstanding == 0


def test_seconds_are_what_the_clock_says_and_add_up_over_a_stream():
    ticks = iter([10.0, 13.0, 17.0])
    predictor = Predictor(MeanEngine(), settings(), busy=lambda: next(ticks))
    answered = list(predictor.stream([block([1, 2]), block([3, None, 5, 6], first_row=2)]))
    seconds = [sum(table.column("predict_seconds").to_pylist()) for table in answered]
    assert seconds == pytest.approx([3.0, 4.0])
