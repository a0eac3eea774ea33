"""The rows of a labeled manifest, in order: which have a label to be judged by, and what became of the others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.evaluation.classification_metrics import Categories
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.ids import InvalidIds, find_bad_ids
from batchcls.manifest.snapshot import Manifest, open_labeled
from batchcls.schema import IMAGE, ITEM_ID, ROW, URI
from batchcls.storage.filesystem import Storage

NO_LABEL = "no_label"
UNKNOWN_LABEL = "unknown_label"
NOT_IN_RUN = "not_in_run"

_FRAGMENT_TABLES = 64

NOTES = pa.schema(
    [
        (ROW, pa.int64()),
        (ITEM_ID, pa.string()),
        (URI, pa.string()),
        ("label", pa.string()),
        ("reason", pa.string()),
    ]
)
"""What is kept of every row of the manifest; `reason` says why a row was not judged."""


@dataclass(frozen=True, slots=True)
class LabeledPart:
    """Some rows of the manifest: all of them as NOTES, and those to be judged with their categories."""

    notes: pa.Table
    rows: pa.Table
    truth: Categories


@dataclass(frozen=True, slots=True)
class LabeledManifest:
    """A manifest opened with its labels."""

    manifest: Manifest
    bad_ids: InvalidIds
    storage: Storage

    @classmethod
    def open(
        cls, uri: str, storage: Storage, *, id_column: str, label_column: str, limit: int | None
    ) -> "LabeledManifest":
        """Open and check it.

        Raises:
            InputError: it cannot be read, or has no such column of text.
        """
        manifest = open_labeled(uri, storage, label_column, id_column=id_column, limit=limit)
        return cls(manifest, find_bad_ids(manifest, storage), storage)

    def without_images(self) -> "LabeledManifest":
        """The same rows without images that stand in the manifest itself."""
        columns = replace(self.manifest.columns, image=None)
        return replace(self, manifest=replace(self.manifest, columns=columns))

    def parts(self, labels: Sequence[str] | None, rows_per_part: int) -> Iterator[LabeledPart]:
        """The rows in order; of those to be judged row, item_id, uri and image.

        Args:
            labels: the model's, in order; None: any label will do, and all categories are 0.
            rows_per_part: of one part at most.
        """
        reader = FragmentReader(self.manifest.columns, self.storage)
        known = None if labels is None else pa.array(labels, pa.string())
        (column,) = self.manifest.columns.kept
        for fragment in self.manifest.fragments(repeat(rows_per_part * _FRAGMENT_TABLES)):
            for table in reader.read(fragment, rows_per_part):
                yield self._part(table, table.column(column.name), known)

    def _part(self, table: pa.Table, label: pa.ChunkedArray, known: pa.Array | None) -> LabeledPart:
        places = pc.index_in(label, value_set=known) if known is not None else _zeros(label)
        first = table.column(ROW)[0].as_py()
        reasons: list[str | None] = [
            NO_LABEL if text is None else UNKNOWN_LABEL if place is None else None
            for text, place in zip(label.to_pylist(), places.to_pylist(), strict=True)
        ]
        for row, failure in self.bad_ids.between(first, first + table.num_rows).items():
            reasons[row - first] = failure.reason.value
        reason = pa.array(reasons, pa.string())
        judged = reason.is_null()
        notes = pa.table(
            [table.column(ROW), table.column(ITEM_ID), table.column(URI), label, reason], schema=NOTES
        )
        truth = places.filter(judged).to_numpy().astype(np.int32)
        return LabeledPart(notes, table.select([ROW, ITEM_ID, URI, IMAGE]).filter(judged), truth)


def with_failures(notes: pa.Table, failures: Mapping[int, str]) -> pa.Table:
    """Notes in the order of their rows, with the reasons of rows that could not be judged after all."""
    reasons = notes.column("reason").to_pylist()
    for row, reason in failures.items():
        reasons[row] = reason
    return notes.set_column(NOTES.get_field_index("reason"), "reason", pa.array(reasons, pa.string()))


def _zeros(label: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(label.is_valid(), pa.scalar(0, pa.int32()), pa.scalar(None, pa.int32()))
