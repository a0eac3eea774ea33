"""Reads the rows of a labeled manifest in order and records why rows are excluded from evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.evaluation.classification_metrics import Categories
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.ids import InvalidIds, find_invalid_ids
from batchcls.manifest.labeled_manifest import (
    REASON_NO_LABEL,
    REASON_UNKNOWN_LABEL,
    UNKNOWN_CLASS,
    UNLABELED_CLASS,
    LabelColumn,
    read_label_column,
)
from batchcls.manifest.snapshot import Manifest
from batchcls.schema import IMAGE, ITEM_ID, ROW, URI
from batchcls.storage.filesystem import Storage

NOT_IN_RUN = "not_in_run"
"""Reason why evaluation excludes a row that the run does not contain."""

_FRAGMENT_TABLES = 64

_REASONS = {UNLABELED_CLASS: REASON_NO_LABEL, UNKNOWN_CLASS: REASON_UNKNOWN_LABEL}

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
    """A manifest with the labels of its rows.

    Attributes:
        manifest: the manifest, without its label column.
        labels: labels of all rows.
        invalid_ids: rows whose ID is null or a duplicate.
        storage: storage that holds the manifest.
    """

    manifest: Manifest
    labels: LabelColumn
    invalid_ids: InvalidIds
    storage: Storage

    @classmethod
    def read(cls, manifest: Manifest, storage: Storage) -> "LabeledManifest":
        """Read the labels and check the IDs of a manifest that was opened with `open_labeled_manifest`.

        Raises:
            InputError: the manifest is not readable, or no row has a label.
        """
        labels = read_label_column(manifest, storage)
        manifest = manifest.without_kept()
        return cls(manifest, labels, find_invalid_ids(manifest, storage), storage)

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
        if labels is None:
            classes = np.minimum(self.labels.codes, 0)
        else:
            classes = self.labels.classes(pa.array(labels, pa.string()))
        reader = FragmentReader(self.manifest.columns, self.storage)
        for fragment in self.manifest.fragments(repeat(rows_per_part * _FRAGMENT_TABLES)):
            for table in reader.read(fragment, rows_per_part):
                yield self._part(table, classes)

    def _part(self, table: pa.Table, classes: npt.NDArray[np.int32]) -> LabeledPart:
        first = table.column(ROW)[0].as_py()
        stop = first + table.num_rows
        classes = classes[first:stop]
        reasons = [_REASONS.get(index) for index in classes.tolist()]
        for row, failure in self.invalid_ids.between(first, stop).items():
            reasons[row - first] = failure.reason.value
        reason = pa.array(reasons, pa.string())
        included = reason.is_null()
        label = self.labels.texts(first, stop)
        notes = pa.table(
            [table.column(ROW), table.column(ITEM_ID), table.column(URI), label, reason], schema=NOTES
        )
        rows = table.select([ROW, ITEM_ID, URI, IMAGE]).filter(included)
        return LabeledPart(notes, rows, classes[included.to_numpy(zero_copy_only=False)])


def with_failures(notes: pa.Table, failures: Mapping[int, str]) -> pa.Table:
    """The notes with the reasons of `failures`, which maps row numbers to reasons."""
    reasons = notes.column("reason").to_pylist()
    for row, reason in failures.items():
        reasons[row] = reason
    return notes.set_column(NOTES.get_field_index("reason"), "reason", pa.array(reasons, pa.string()))
