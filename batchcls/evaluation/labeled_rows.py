"""Reads the rows of a labeled manifest in order and records why rows are excluded from evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.evaluation.classification_metrics import Categories
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.ids import InvalidIds, find_bad_ids
from batchcls.manifest.labeled_manifest import REASON_NO_LABEL, REASON_UNKNOWN_LABEL
from batchcls.manifest.snapshot import Manifest, open_labeled
from batchcls.schema import IMAGE, ITEM_ID, ROW, URI
from batchcls.storage.filesystem import Storage

NOT_IN_RUN = "not_in_run"
"""Reason why evaluation excludes a row that the run does not contain."""

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
"""Schema of the notes on every row; `reason` states why a row is excluded, null for evaluated rows."""


@dataclass(frozen=True, slots=True)
class LabeledPart:
    """A batch of rows: notes on all of them (NOTES), and the rows to evaluate with their class indices."""

    notes: pa.Table
    rows: pa.Table
    truth: Categories


@dataclass(frozen=True, slots=True)
class LabeledManifest:
    """A manifest opened with its label column."""

    manifest: Manifest
    bad_ids: InvalidIds
    storage: Storage

    @classmethod
    def open(
        cls, uri: str, storage: Storage, *, id_column: str, label_column: str, limit: int | None
    ) -> "LabeledManifest":
        """Open the manifest and check its IDs.

        Raises:
            InputError: the manifest is not readable, or the label column is missing or not text.
        """
        manifest = open_labeled(uri, storage, label_column, id_column=id_column, limit=limit)
        return cls(manifest, find_bad_ids(manifest, storage), storage)

    def without_images(self) -> "LabeledManifest":
        """The same rows without the images stored in the manifest."""
        columns = replace(self.manifest.columns, image=None)
        return replace(self, manifest=replace(self.manifest, columns=columns))

    def parts(self, labels: Sequence[str] | None, rows_per_part: int) -> Iterator[LabeledPart]:
        """Iterate over the rows in order. Rows to evaluate have the columns row, item_id, uri and image.

        Args:
            labels: class names of the model, in order. None accepts any label, with class index 0.
            rows_per_part: maximum number of rows of a part.
        """
        reader = FragmentReader(self.manifest.columns, self.storage)
        known = None if labels is None else pa.array(labels, pa.string())
        (column,) = self.manifest.columns.kept
        for fragment in self.manifest.fragments(repeat(rows_per_part * _FRAGMENT_TABLES)):
            for table in reader.read(fragment, rows_per_part):
                yield self._part(table, table.column(column.name), known)

    def _part(self, table: pa.Table, label: pa.ChunkedArray, known: pa.Array | None) -> LabeledPart:
        indices = pc.index_in(label, value_set=known) if known is not None else _zeros(label)
        first = table.column(ROW)[0].as_py()
        reasons: list[str | None] = [
            REASON_NO_LABEL if text is None else REASON_UNKNOWN_LABEL if index is None else None
            for text, index in zip(label.to_pylist(), indices.to_pylist(), strict=True)
        ]
        for row, failure in self.bad_ids.between(first, first + table.num_rows).items():
            reasons[row - first] = failure.reason.value
        reason = pa.array(reasons, pa.string())
        included = reason.is_null()
        notes = pa.table(
            [table.column(ROW), table.column(ITEM_ID), table.column(URI), label, reason], schema=NOTES
        )
        truth = indices.filter(included).to_numpy().astype(np.int32)
        return LabeledPart(notes, table.select([ROW, ITEM_ID, URI, IMAGE]).filter(included), truth)


def with_failures(notes: pa.Table, failures: Mapping[int, str]) -> pa.Table:
    """The notes with the reasons of `failures`, which maps row numbers to reasons."""
    reasons = notes.column("reason").to_pylist()
    for row, reason in failures.items():
        reasons[row] = reason
    return notes.set_column(NOTES.get_field_index("reason"), "reason", pa.array(reasons, pa.string()))


def _zeros(label: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(label.is_valid(), pa.scalar(0, pa.int32()), pa.scalar(None, pa.int32()))
