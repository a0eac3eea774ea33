import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchcls.manifest.row_ranges import RowRanges
from batchcls.runs.receipts import balance


def ranges(*pairs: tuple[int, int]) -> RowRanges:
    return RowRanges(np.array([a for a, _ in pairs], np.int64), np.array([b for _, b in pairs], np.int64))


def pairs(row_ranges: RowRanges) -> list[tuple[int, int]]:
    return list(zip(row_ranges.starts.tolist(), row_ranges.stops.tolist(), strict=True))


def test_rows_are_stored_as_the_fewest_ranges():
    assert pairs(RowRanges.of(np.array([7, 3, 4, 5, 9, 8]))) == [(3, 6), (7, 10)]
    assert pairs(RowRanges.of(np.array([], np.int64))) == []


def test_repeated_row_in_one_part_is_an_error():
    with pytest.raises(ValueError, match="row 4 occurs twice"):
        RowRanges.of(np.array([4, 3, 4]))


def test_parts_in_any_order_that_cover_every_row_once_are_exact():
    result = balance([ranges((5, 10)), ranges((0, 2), (3, 5)), ranges((2, 3))], 10)
    assert result.is_exact
    assert str(result) == "every row once"


def test_missing_repeated_and_unknown_rows_are_distinguished():
    result = balance([ranges((0, 3)), ranges((2, 4)), ranges((6, 8)), ranges((11, 12))], 10)
    assert pairs(result.missing) == [(4, 6), (8, 10)]
    assert pairs(result.repeated) == [(2, 3)]
    assert pairs(result.beyond) == [(11, 12)]
    assert "4 rows missing (first: 4)" in str(result)
    assert not result.is_exact


def test_all_rows_are_missing_without_parts():
    assert pairs(balance([], 4).missing) == [(0, 4)]


@given(st.lists(st.lists(st.integers(0, 30), max_size=12, unique=True), max_size=6), st.integers(1, 25))
def test_balance_agrees_with_counting(parts: list[list[int]], rows: int):
    counts = np.zeros(40, int)
    for part in parts:
        counts[part] += 1
    result = balance([RowRanges.of(np.array(part, np.int64)) for part in parts], rows)
    expected = {row for row in range(rows) if counts[row] == 0}
    assert {row for a, b in pairs(result.missing) for row in range(a, b)} == expected
    assert {row for a, b in pairs(result.repeated) for row in range(a, b)} == {
        r for r in range(40) if counts[r] > 1
    }
    assert {row for a, b in pairs(result.beyond) for row in range(a, b)} == {
        r for r in range(rows, 40) if counts[r]
    }
    assert result.is_exact == (all(counts[:rows] == 1) and not counts[rows:].any())
