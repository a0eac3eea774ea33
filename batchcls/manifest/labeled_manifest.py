"""The labels of a labeled manifest, one for each row, as numbers into the distinct ones. Needs no torch.

Letters: N rows of the manifest, K categories.
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

NO_LABEL = -1
"""The class of a row without a label: null, or nothing but blanks."""

UNKNOWN_LABEL = -2
"""The class of a row whose label is none of the model's."""


@dataclass(frozen=True, slots=True)
class LabelColumn:
    """The labels of N rows.

    Attributes:
        distinct: every label once, as string array, in no particular order, never null or blank.
        codes: N int32, the row's place in `distinct`, or NO_LABEL.
    """

    distinct: pa.Array
    codes: npt.NDArray[np.int32]

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Rows of each distinct label."""
        return np.bincount(self.codes[self.codes != NO_LABEL], minlength=len(self.distinct))

    @property
    def without(self) -> npt.NDArray[np.int64]:
        """Numbers of the rows that have no label, ascending."""
        return np.flatnonzero(self.codes == NO_LABEL)

    def classes(self, labels: pa.Array) -> npt.NDArray[np.int32]:
        """N class indices: the row's place in `labels`, or NO_LABEL, or UNKNOWN_LABEL."""
        places = pc.fill_null(pc.index_in(self.distinct, value_set=labels), UNKNOWN_LABEL)
        # The last entry is what NO_LABEL, which is -1, takes.
        table = np.append(places.to_numpy(zero_copy_only=False), NO_LABEL).astype(np.int32)
        classes: npt.NDArray[np.int32] = table[self.codes]
        return classes


def read_labels_of(manifest: Manifest, storage: Storage) -> LabelColumn:
    """Walk over the labels of the whole snapshot; memory follows 4 bytes a row and the distinct labels.

    Args:
        manifest: opened with the labels as the one kept column, as `batchcls.manifest.open_labeled` does.
        storage: how to reach it.

    Raises:
        InputError: the column cannot be read, is no text, or no row has a label.
    """
    (field,) = manifest.columns.kept
    chunks = [
        values.dictionary_encode()
        for _, values in column_batches(manifest, field.name, storage)
        if len(values)
    ]
    return label_column(pa.chunked_array(chunks), field.name)


def label_column(values: pa.ChunkedArray, name: str = "label") -> LabelColumn:
    """Strings, plain or dictionary encoded, as labels. Raises InputError if no row has one."""
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    encoded = values.unify_dictionaries().combine_chunks()
    distinct = encoded.dictionary
    named = pc.not_equal(pc.utf8_length(pc.utf8_trim_whitespace(distinct)), 0)
    named = pc.fill_null(named, False).to_numpy(zero_copy_only=False)
    # Places among the labels that are names; the last entry is what a null, -1, takes.
    places = np.append(np.where(named, np.cumsum(named) - 1, NO_LABEL), NO_LABEL).astype(np.int32)
    codes = pc.fill_null(encoded.indices, NO_LABEL).to_numpy(zero_copy_only=False)
    found = LabelColumn(distinct.filter(pa.array(named)), places[codes])
    if len(found.distinct) == 0:
        raise InputError(
            f"column {name}: all {len(codes)} rows are null or blank; training and evaluation need labels"
        )
    return found
