"""Which labels of two runs correspond to each other after their label maps, for gates, diff and report."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import duckdb
import pyarrow as pa

from batchcls.models.label_map import LabelMap

_NO_MAP = LabelMap()

JOIN_LABEL_GROUPS = """
LEFT JOIN old_label_groups AS old_groups ON old_groups.label = old.label
LEFT JOIN new_label_groups AS new_groups ON new_groups.label = new.label
"""
"""Joins the tables of `LabelGroups.register` to a query over `old` and `new` with a column `label` each."""

CORRESPONDS = """(
    coalesce(old_groups.is_retired, false)
    OR coalesce(old_groups.name, old.label) IS NOT DISTINCT FROM coalesce(new_groups.name, new.label)
)"""
"""Whether the labels of a row of this join are the same after the maps."""


@dataclass(frozen=True)
class LabelGroups:
    """Groups of labels of an old and a new run that stem from the same classes; any other label is its own group.

    Attributes:
        old, new: name of the group of a label of each run.
        retired: labels of the old run that were retired without a replacement.
    """

    old: Mapping[str, str] = field(default_factory=dict)
    new: Mapping[str, str] = field(default_factory=dict)
    retired: frozenset[str] = frozenset()

    @classmethod
    def between(cls, before: LabelMap | None, now: LabelMap | None) -> Self:
        """The groups of two runs with these maps; only equal labels correspond if the new run has no map.

        The labels of both maps are those of the bundle, so a label of the old run has the labels that the new map
        gives to its classes. Labels that share one of these form a group.
        """
        if now is None or before == now:
            return cls()
        before = before or _NO_MAP
        edges = list(_edges(before, now))
        parent: dict[tuple[bool, str], tuple[bool, str]] = {}

        def root(node: tuple[bool, str]) -> tuple[bool, str]:
            while parent.setdefault(node, node) != node:
                node = parent[node]
            return node

        for old, new in edges:
            if new is not None:
                # The new label, with the higher key, becomes the root, so that groups have names of new labels.
                low, high = sorted((root((False, old)), root((True, new))))
                parent[low] = high
        groups = {node: root(node)[1] for node in list(parent)}
        found = {
            side: {label: name for (is_new, label), name in groups.items() if is_new is side}
            for side in (False, True)
        }
        retired = frozenset(old for old, _ in edges if old not in found[False])
        return cls(found[False], found[True], retired)

    def old_categories(self, categories: Mapping[str, int]) -> Counter[str]:
        """Rows by group from rows by label of the old run, without retired labels."""
        return _sums(
            {label: rows for label, rows in categories.items() if label not in self.retired}, self.old
        )

    def new_categories(self, categories: Mapping[str, int]) -> Counter[str]:
        """Rows by group from rows by label of the new run."""
        return _sums(categories, self.new)

    def register(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Create the tables that `JOIN_LABEL_GROUPS` reads."""
        schema = pa.schema([("label", pa.string()), ("name", pa.string()), ("is_retired", pa.bool_())])
        old = [(label, name, False) for label, name in self.old.items()]
        old += [(label, label, True) for label in sorted(self.retired)]
        new = [(label, name, False) for label, name in self.new.items()]
        for side, rows in (("old", old), ("new", new)):
            columns = list(zip(*rows, strict=True)) or [(), (), ()]
            table = pa.table(
                [pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)], schema
            )
            connection.register(f"{side}_label_groups", table)


def _edges(before: LabelMap, now: LabelMap) -> Iterator[tuple[str, str | None]]:
    """Yield pairs of an old and a new label of the same class; None for a class that is retired now."""
    classes = {label for found in (before, now) for label in found.mentioned()}
    for found in (before, now):
        classes |= {label for label in found.retire.values() if label}
        for whole in found.split:
            classes |= found.sources(whole)
    for label in sorted(classes):
        new = now.targets(label)
        for old in sorted(before.targets(label)):
            # A label of equal splits corresponds to itself only.
            is_same = old in new and None not in (before.split_of(old), now.split_of(old))
            for target in sorted({old} if is_same else new):
                yield old, target
            if not new:
                yield old, None


def _sums(categories: Mapping[str, int], groups: Mapping[str, str]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for label, rows in categories.items():
        sums[groups.get(label, label)] += rows
    return sums
