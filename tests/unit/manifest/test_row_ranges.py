"""Row ranges behave like sets of rows."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchcls.manifest.row_ranges import RowRanges

SETS = st.sets(st.integers(0, 60), max_size=40)


def ranges(rows: set[int]) -> RowRanges:
    return RowRanges.of(np.array(sorted(rows), np.int64))


@given(SETS)
def test_rows_round_trip(rows: set[int]):
    assert ranges(rows).rows().tolist() == sorted(rows)
    assert len(ranges(rows)) == len(rows)


@given(SETS, st.integers(0, 60), st.integers(0, 60))
def test_between_is_the_intersection_with_a_range(rows: set[int], start: int, stop: int):
    expected = sorted(row for row in rows if start <= row < stop)
    assert ranges(rows).between(start, stop).rows().tolist() == expected


@given(SETS, st.integers(0, 50))
def test_split_returns_the_first_rows_and_the_rest(rows: set[int], count: int):
    head, tail = ranges(rows).split(count)
    assert head.rows().tolist() == sorted(rows)[:count]
    assert tail.rows().tolist() == sorted(rows)[count:]


def test_all_rows():
    assert RowRanges.all(3).rows().tolist() == [0, 1, 2]
    assert len(RowRanges.all(0)) == 0
