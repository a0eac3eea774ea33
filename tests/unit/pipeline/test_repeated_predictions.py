"""Outcomes of repeated images: remembered, completed, and full batches without their pixels."""

import numpy as np
import pyarrow as pa
import pytest

from batchcls.errors import BatchclsError
from batchcls.images.loader import pack_pixels
from batchcls.inference.predictor import pixels_of
from batchcls.pipeline.repeated_predictions import KnownPredictions, RepeatedPredictions, fill_blocks
from batchcls.schema import TOP_K_TYPE

COLUMNS = ("width", "height", "reason", "detail", "label", "probability", "top_k", "embedding")


def predicted(contents: str, outcomes: str, first_row: int = 0) -> pa.Table:
    """A predicted block; outcomes are digits for predictions, x for failures, t for timeouts, and - for repeats."""
    good = [outcome.isdigit() for outcome in outcomes]
    failures = {"x": "truncated", "t": "decode_timeout"}
    values = [float(outcome) if ok else None for outcome, ok in zip(outcomes, good, strict=True)]
    top_k = [
        None if value is None else [{"label": f"l{value:g}", "class_index": int(value), "probability": value}]
        for value in values
    ]
    embedding = [None if value is None else [value] * 3 for value in values]
    return pa.table(
        {
            "row": pa.array(range(first_row, first_row + len(contents)), pa.int64()),
            "content_hash": [None if content == "_" else content for content in contents],
            "width": pa.array([None if outcome == "-" else 8 for outcome in outcomes], pa.int32()),
            "height": pa.array([None if outcome == "-" else 9 for outcome in outcomes], pa.int32()),
            "reason": pa.array([failures.get(outcome) for outcome in outcomes], pa.string()),
            "detail": pa.array([failures.get(outcome) for outcome in outcomes], pa.string()),
            "label": pa.array([None if value is None else f"l{value:g}" for value in values], pa.string()),
            "probability": pa.array(values, pa.float32()),
            "top_k": pa.array(top_k, TOP_K_TYPE),
            "embedding": pa.array(embedding, pa.list_(pa.float32(), 3)).cast(pa.list_(pa.float16(), 3)),
        }
    )


def loaded(contents: str, decoded: str) -> pa.Table:
    """A loaded block; rows whose character in `decoded` is 1 have pixels."""
    images = [
        np.full((2, 2, 3), ord(content), np.uint8) if flag == "1" else None
        for content, flag in zip(contents, decoded, strict=True)
    ]
    hashes = [None if content == "_" else content for content in contents]
    return pa.table({"row": range(len(contents)), "content_hash": hashes, "pixels": pack_pixels(images)})


def test_repeated_rows_get_the_outcomes_of_their_block_of_earlier_blocks_and_of_other_fragments():
    known = KnownPredictions(COLUMNS)
    RepeatedPredictions(known).complete(predicted("axt", "1xt"))
    repeated = RepeatedPredictions(known)
    assert (repeated.is_known("a"), repeated.is_known("x")) == (True, True)
    assert not repeated.is_known("t")  # another attempt may have enough time
    assert not repeated.is_known("b")
    first = repeated.complete(predicted("abb_xa", "-2-x--"))
    second = repeated.complete(predicted("bca", "-3-", 6))
    table = pa.concat_tables([first, second])
    expected = predicted("abb_xabca", "122xx1231")
    assert table.drop_columns(["origin"]).equals(expected)
    assert table.column("origin").to_pylist() == [
        *("shared", "computed", "shared", "computed", "shared", "shared"),
        *("shared", "computed", "shared"),
    ]
    assert table.schema.remove(table.schema.get_field_index("origin")) == expected.schema


def test_block_without_repeats_is_returned_with_its_origin():
    block = predicted("ab", "12")
    completed = RepeatedPredictions(KnownPredictions(COLUMNS)).complete(block)
    assert completed.equals(block.append_column("origin", pa.array(["computed", "computed"])))


def test_repeated_row_without_a_known_outcome_is_an_error():
    with pytest.raises(BatchclsError, match="no prediction is known for a repeated image, SHA-256 a"):
        RepeatedPredictions(KnownPredictions(COLUMNS)).complete(predicted("a", "-"))


def test_oldest_images_are_forgotten_unless_they_recur_or_are_in_use():
    known = KnownPredictions(COLUMNS, max_rows=4)
    RepeatedPredictions(known).complete(predicted("ab", "12"))
    pinning = RepeatedPredictions(known)
    assert pinning.is_known("b")
    recurring = RepeatedPredictions(known)
    assert recurring.is_known("a")
    recurring.complete(predicted("ca", "3-"))
    RepeatedPredictions(known).complete(predicted("de", "45"))
    found = RepeatedPredictions(known)
    assert [found.is_known(content) for content in "abcde"] == [True, False, True, True, True]
    assert pinning.complete(predicted("b", "-")).column("label").to_pylist() == ["l2"]
    assert found.complete(predicted("a", "-")).column("label").to_pylist() == ["l1"]


def test_pixels_of_repeated_and_known_images_are_dropped():
    known = KnownPredictions(COLUMNS)
    RepeatedPredictions(known).complete(predicted("a", "1"))
    repeated = RepeatedPredictions(known)
    block = loaded("zabb_cz", "1111011").slice(1, 5).combine_chunks()
    dropped = repeated.drop_pixels(block)
    np.testing.assert_array_equal(
        pixels_of(dropped.column("pixels").chunk(0), (2, 2, 3))[:, 0, 0, 0], [ord("b"), ord("c")]
    )
    values = dropped.column("pixels").to_pylist()
    assert [value is not None for value in values] == [False, True, False, False, True]
    assert [values[1], values[4]] == [bytes([ord("b")] * 12), bytes([ord("c")] * 12)]
    unique = loaded("bc_", "110")
    assert RepeatedPredictions(known).drop_pixels(unique) is unique


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_blocks_are_filled_with_decoded_images(size: int):
    rng = np.random.default_rng(size)
    flags = ["".join(rng.choice(["0", "1"], 5)) for _ in range(40)]
    blocks = [loaded("abcde", flag) for flag in flags]
    filled = list(fill_blocks(blocks, size))
    assert pa.concat_tables(filled).to_pylist() == pa.concat_tables(blocks).to_pylist()
    decoded = [block.num_rows - block.column("pixels").null_count for block in filled]
    assert all(len(block.to_batches()) == 1 for block in filled)
    if size <= 5:
        whole = [block for block in filled if block.column("pixels").null_count == 0 and block.num_rows == 5]
        assert sum(count not in (0, size) for count in decoded) <= 1 + len(whole)
    assert max(block.num_rows for block in filled) <= 4 * size + 5


def test_blocks_of_decoded_images_are_passed_on_and_rows_without_pixels_are_not_held_back():
    whole = loaded("abc", "111")
    assert next(fill_blocks([whole], 8)) is whole
    repeats = [loaded("abcd", "0000") for _ in range(6)]
    assert [block.num_rows for block in fill_blocks(repeats, 2)] == [8, 8, 8]


def test_remembered_rows_do_not_keep_their_block_in_memory():
    known = KnownPredictions(COLUMNS)
    block = predicted("abbt", "122t").append_column("pixels", pack_pixels([None] * 4))
    known.add(block)
    kept = known.find("b")
    assert kept is not None
    assert (kept[0].num_rows, kept[0].column_names) == (2, ["content_hash", *COLUMNS])
    addresses = [
        {
            buffer.address
            for column in table.columns
            for chunk in column.chunks
            for buffer in chunk.buffers()
            if buffer
        }
        for table in (kept[0], block)
    ]
    assert not addresses[0] & addresses[1]
