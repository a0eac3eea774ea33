"""Reads the labels of a labeled manifest as dictionary-encoded classes, without torch.

Arrays have one entry for each of the N rows of the manifest.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import InputError
from batchcls.manifest.ids import column_batches
from batchcls.manifest.snapshot import Manifest
from batchcls.storage.filesystem import Storage

UNLABELED_CLASS = -1
"""Class index of a row whose label is null or blank."""

UNKNOWN_CLASS = -2
"""Class index of a row whose label is not one of the model's classes."""

REASON_NO_LABEL = "no_label"
"""Reason why evaluation excludes a row without a label."""

REASON_UNKNOWN_LABEL = "unknown_label"
"""Reason why evaluation excludes a row whose label is not one of the model's classes."""


@dataclass(frozen=True, slots=True)
class LabelColumn:
    """The labels of N rows.

    Attributes:
        distinct: string array of the distinct labels in arbitrary order, without null and blank labels.
        codes: int32 indices into `distinct` of shape (N,), or UNLABELED_CLASS.
    """

    distinct: pa.Array
    codes: npt.NDArray[np.int32]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Number of rows of each distinct label."""
        return np.bincount(self.codes[self.codes != UNLABELED_CLASS], minlength=len(self.distinct))

    @property
    def without(self) -> npt.NDArray[np.int64]:
        """Row numbers without a label, in ascending order."""
        return np.flatnonzero(self.codes == UNLABELED_CLASS)

    def classes(self, labels: pa.Array) -> npt.NDArray[np.int32]:
        """Class indices of shape (N,): indices into `labels`, UNLABELED_CLASS or UNKNOWN_CLASS."""
        indices = pc.fill_null(pc.index_in(self.distinct, value_set=labels), UNKNOWN_CLASS)
        # UNLABELED_CLASS is -1 and therefore selects the last entry.
        table = np.append(indices.to_numpy(zero_copy_only=False), UNLABELED_CLASS).astype(np.int32)
        classes: npt.NDArray[np.int32] = table[self.codes]
        return classes


def read_labels_of(manifest: Manifest, storage: Storage) -> LabelColumn:
    """Read the labels of the whole snapshot. Uses 4 bytes per row plus the distinct labels.

    Args:
        manifest: manifest opened with `batchcls.manifest.snapshot.open_labeled`.
        storage: storage that holds the manifest.

    Raises:
        InputError: the column is not readable or not text, or no row has a label.
    """
    (field,) = manifest.columns.kept
    chunks = [
        values.dictionary_encode()
        for _, values in column_batches(manifest, field.name, storage)
        if len(values)
    ]
    return label_column(pa.chunked_array(chunks), field.name)


def label_column(values: pa.ChunkedArray, name: str = "label") -> LabelColumn:
    """Convert strings, plain or dictionary-encoded. Raises InputError if no row has a label."""
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    encoded = values.unify_dictionaries().combine_chunks()
    distinct = encoded.dictionary
    is_name = pc.not_equal(pc.utf8_length(pc.utf8_trim_whitespace(distinct)), 0)
    is_name = pc.fill_null(is_name, False).to_numpy(zero_copy_only=False)
    # Indices among the non-blank labels. Null has the code -1 and therefore selects the last entry.
    indices = np.append(np.where(is_name, np.cumsum(is_name) - 1, UNLABELED_CLASS), UNLABELED_CLASS).astype(
        np.int32
    )
    codes = pc.fill_null(encoded.indices, UNLABELED_CLASS).to_numpy(zero_copy_only=False)
    column = LabelColumn(distinct.filter(pa.array(is_name)), indices[codes])
    if len(column.distinct) == 0:
        raise InputError(
            f"column {name}: all {len(codes)} rows are null or blank; training and evaluation need labels"
        )
    return column
