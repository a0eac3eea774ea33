"""Chooses the cases of parametrized tests that `make test` runs; `make long` runs the others."""

from collections.abc import Collection, Hashable, Iterable
from typing import Any

import pytest

from batchcls.models.registry import zoo_records


def long_except(kept: Collection[Hashable], cases: Iterable[Any]) -> list[Any]:
    """Return the cases for `parametrize`, marked as long unless their name, the case or its first value, is kept.

    Raises:
        ValueError: a kept name is not the name of a case.
    """
    kept = list(kept)  # not a set, because cases may be unhashable
    chosen: list[Any] = []
    names: list[Any] = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        name = getattr(values[0], "name", values[0])
        names.append(name)
        chosen.append(case if name in kept else pytest.param(*values, marks=pytest.mark.long))
    if unknown := [name for name in kept if name not in names]:
        raise ValueError(f"not among the cases: {unknown}")
    return chosen


def zoo() -> list[Any]:
    """Return the records of the zoo, of which the smallest of each family is not long."""
    records = zoo_records()
    smallest = {record.family: record.name for record in sorted(records, key=lambda r: -r.parameters)}
    return long_except(set(smallest.values()), records)
