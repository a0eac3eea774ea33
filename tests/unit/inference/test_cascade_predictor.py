"""A cascade of two engines whose outputs are easy to verify."""

from dataclasses import replace
from itertools import count

import numpy as np
import pyarrow as pa
import pytest

from batchcls.inference.cascade_predictor import CascadePredictor
from batchcls.inference.predictor import Predictor
from batchcls.models.engines.engine import EngineOutput
from batchcls.schema import LARGE, LARGE_PIXELS, LARGE_PREDICT_SECONDS, PREDICTED_BY, SMALL
from tests.unit.inference.test_predictor import MeanEngine, block, settings


class ShiftedEngine(MeanEngine):
    """Predicts the class after that of `MeanEngine`, and records the sizes of its batches."""

    def predict(self, pixels: np.ndarray) -> EngineOutput:
        self.sizes = [*getattr(self, "sizes", []), len(pixels)]
        output = super().predict(pixels)
        return EngineOutput(np.roll(output.logits, 1, axis=1), output.embedding)


def cascade(
    thresholds: list[float], large: MeanEngine | None = None, batch_size: int = 4
) -> CascadePredictor:
    """A cascade of ten classes."""
    small = replace(settings(), predicted_by=SMALL)
    of_large = replace(
        settings(batch_size=batch_size), predicted_by=LARGE, embedding=None, l2_normalize=False, kept=()
    )
    return CascadePredictor(
        Predictor(MeanEngine(), small), Predictor(large or ShiftedEngine(), of_large), of_large, thresholds
    )


ALL_BUT_EVEN = [0.0 if number % 2 == 0 else 1.0 for number in range(10)]


def test_rows_below_the_threshold_of_their_class_are_predicted_by_the_large_network():
    predicted = cascade(ALL_BUT_EVEN)(block([2, 3, None, 4, 5]))
    assert predicted.column("label").to_pylist() == ["2", "4", None, "4", "6"]
    assert predicted.column(PREDICTED_BY).to_pylist() == [SMALL, LARGE, None, SMALL, LARGE]
    assert predicted.column("embedding").to_pylist() == [[2, 2], [3, 3], None, [4, 4], [5, 5]]
    assert predicted.column("reason").to_pylist() == [None, None, "truncated", None, None]
    assert predicted.column("item_id").to_pylist() == [f"id{i}" for i in range(5)]
    assert predicted.column("shop").to_pylist() == [f"s{i}" for i in range(5)]
    top_k = predicted.column("top_k").to_pylist()
    assert [best and best[0]["label"] for best in top_k] == predicted.column("label").to_pylist()
    expected = replace(settings(), predicted_by=SMALL).output_schema
    assert predicted.schema.equals(expected.append(pa.field(LARGE_PREDICT_SECONDS, pa.float32())))


def test_rows_do_not_depend_on_blocks_and_batches_of_the_large_network_are_full():
    values = [number % 9 if number % 11 else None for number in range(200)]
    whole = cascade(ALL_BUT_EVEN)(block(values))
    large = ShiftedEngine()
    blocks = [block(values[start : start + 7], first_row=start) for start in range(0, 200, 7)]
    streamed = list(cascade(ALL_BUT_EVEN, large).stream(iter(blocks)))
    assert [part.num_rows for part in streamed] == [part.num_rows for part in blocks]
    joined = pa.concat_tables(streamed)
    for name in ("row", "label", "probability", PREDICTED_BY, "embedding"):
        assert joined.column(name).equals(whole.column(name)), name
    uncertain = sum(value is not None and value % 2 == 1 for value in values)
    assert sum(large.sizes) == uncertain
    assert sum(size == 4 for size in large.sizes) >= 0.8 * len(large.sizes)


@pytest.mark.parametrize("threshold", [0.0, float("inf")])
def test_no_row_or_every_row_can_be_uncertain(threshold: float):
    predicted = cascade([threshold] * 10)(block([1, None, 3]))
    network = SMALL if threshold == 0 else LARGE
    assert predicted.column(PREDICTED_BY).to_pylist() == [network, None, network]
    empty = cascade([threshold] * 10)(block([None, None]))
    assert empty.column("label").null_count == 2


def test_large_network_takes_its_pixels():
    table = block([1, 3, None])
    other = block([6, 8, None]).column("pixels")
    predicted = cascade(ALL_BUT_EVEN, MeanEngine())(table.append_column(LARGE_PIXELS, other))
    assert predicted.column("label").to_pylist() == ["6", "8", None]
    assert LARGE_PIXELS not in predicted.column_names
    assert predicted.column("embedding").to_pylist() == [[1, 1], [3, 3], None]


def test_non_finite_output_of_the_large_network_fails_the_row():
    table = block([1, 2])
    other = block([255, 255]).column("pixels")
    predicted = cascade(ALL_BUT_EVEN, MeanEngine())(table.append_column(LARGE_PIXELS, other))
    assert predicted.column("reason").to_pylist() == ["non_finite", None]
    assert predicted.column("label").to_pylist() == [None, "2"]


def test_seconds_of_both_networks_are_counted_separately():
    ticks = count()
    small = Predictor(MeanEngine(), replace(settings(), predicted_by=SMALL), lambda: next(ticks))
    of_large = replace(settings(), predicted_by=LARGE, embedding=None, kept=())
    large = Predictor(ShiftedEngine(), of_large, lambda: next(ticks))
    predicted = CascadePredictor(small, large, of_large, ALL_BUT_EVEN)(block([1, 2, 3, 4]))
    assert sum(predicted.column("predict_seconds").to_pylist()) == pytest.approx(1)
    assert predicted.column(LARGE_PREDICT_SECONDS).to_pylist() == pytest.approx([0.5, 0, 0.5, 0])
