"""Opens labeled manifests and reads their labels, without torch.

Training, evaluation and comparison read labels with this module, so that they agree on which rows have
none: those whose label is null, empty or only whitespace. Arrays have one entry for each of the N rows
of the manifest.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import InputError
from batchcls.manifest.column_types import LABEL_COLUMN
from batchcls.manifest.ids import column_batches
from batchcls.manifest.snapshot import Manifest, open_manifest
from batchcls.schema import IMAGE, ITEM_ID, ROW, SOURCE_VERSION, URI, URI_FAULT
from batchcls.storage.filesystem import Storage, redact_uri

UNLABELED_CLASS = -1
"""Class index of a row whose label is null or blank."""

UNKNOWN_CLASS = -2
"""Class index of a row whose label is not one of the model's classes."""

REASON_NO_LABEL = "no_label"
"""Reason why evaluation excludes a row whose label is null or blank."""

REASON_UNKNOWN_LABEL = "unknown_label"
"""Reason why evaluation excludes a row whose label is not one of the model's classes."""


@dataclass(frozen=True, slots=True)
class LabelColumn:
    """The labels of N rows.

    Attributes:
        distinct: string array of the distinct labels in arbitrary order, without null and blank labels.
        codes: int32 indices into `distinct` of shape (N,), or UNLABELED_CLASS.
        blank_rows: number of rows whose label is empty or only whitespace.
    """

    distinct: pa.Array
    codes: npt.NDArray[np.int32]
    blank_rows: int

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """Number of rows of each distinct label."""
        return np.bincount(self.codes[self.codes != UNLABELED_CLASS], minlength=len(self.distinct))

    @property
    def unlabeled_rows(self) -> npt.NDArray[np.int64]:
        """Row numbers without a label, in ascending order."""
        return np.flatnonzero(self.codes == UNLABELED_CLASS)

    def classes(self, labels: pa.Array) -> npt.NDArray[np.int32]:
        """Class indices of shape (N,): indices into `labels`, UNLABELED_CLASS or UNKNOWN_CLASS."""
        indices = pc.fill_null(pc.index_in(self.distinct, value_set=labels), UNKNOWN_CLASS)
        # UNLABELED_CLASS is -1 and therefore selects the last entry.
        table = np.append(indices.to_numpy(zero_copy_only=False), UNLABELED_CLASS).astype(np.int32)
        classes: npt.NDArray[np.int32] = table[self.codes]
        return classes

    def texts(self, start: int, stop: int) -> pa.Array:
        """The labels of the rows `start..stop-1` as strings, null for rows without a label."""
        codes = self.codes[start:stop]
        return self.distinct.take(pa.array(codes, mask=codes == UNLABELED_CLASS))

    def describe(self) -> str:
        """Human-readable counts, for example `1,000 rows, 990 with a label (8 null, 2 blank)`."""
        rows, unlabeled = len(self.codes), len(self.unlabeled_rows)
        text = f"{rows:,} rows, {rows - unlabeled:,} with a label"
        if unlabeled:
            text += f" ({unlabeled - self.blank_rows:,} null, {self.blank_rows:,} blank)"
        return text


def open_labeled_manifest(
    uri: str,
    storage: Storage,
    label_column: str,
    *,
    id_column: str = ITEM_ID,
    limit: int | None = None,
    optional: bool = False,
) -> Manifest:
    """Open a manifest with its label column as the only kept column, read as text.

    Args:
        uri: a Parquet file, a folder or a glob, local or remote.
        storage: storage that holds the manifest.
        label_column: name of the column with the true class names. Integers and booleans are converted to text.
        id_column: name of the column with the unique IDs.
        limit: maximum number of rows, counted from the first row.
        optional: accept a manifest without a label column; it then has no kept column.

    Raises:
        InputError: see `open_manifest`; or the label column is missing, names images, or has an unsupported type.
    """
    if label_column in (id_column, URI, IMAGE):
        raise InputError(f"--label-column {label_column}: that column names images; name one of labels")
    if label_column in (ROW, ITEM_ID, SOURCE_VERSION, URI_FAULT):
        raise InputError(
            f"--label-column {label_column}: this name is reserved for a column of the program; rename the column"
        )
    manifest = open_manifest(
        uri, storage, id_column=id_column, keep=[label_column], limit=limit, optional=True
    )
    if not manifest.columns.kept:
        if optional:
            return manifest
        raise InputError(
            f"--label-column {label_column} is missing: {redact_uri(manifest.files[0].uri)} has no column "
            f"{label_column}; it has {manifest.column_names}; name the column with the true class names with "
            "--label-column, or create a manifest from folders with `batchcls manifest from-folder "
            "--labels-from-folders`"
        )
    return with_text_labels(manifest)


def with_text_labels(manifest: Manifest) -> Manifest:
    """Return the manifest with its only kept column, the labels, read as text.

    Raises:
        InputError: the values of the column are not text, integers or booleans.
    """
    (field,) = manifest.columns.kept
    LABEL_COLUMN.require_type(field.type, f"{LABEL_COLUMN.flag} {field.name}")
    return replace(manifest, columns=replace(manifest.columns, kept=(pa.field(field.name, pa.string()),)))


def read_label_column(manifest: Manifest, storage: Storage) -> LabelColumn:
    """Read the labels of all rows. Uses 4 bytes per row plus the distinct labels.

    Args:
        manifest: manifest opened with `open_labeled_manifest`.
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
    return encode_labels(pa.chunked_array(chunks), field.name)


def encode_labels(values: pa.ChunkedArray, name: str = "label") -> LabelColumn:
    """Encode strings, plain or dictionary-encoded.

    Raises:
        InputError: no row has a label; `name` is the name of the column in the message.
    """
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    encoded = values.unify_dictionaries().combine_chunks()
    is_label = pc.invert(_is_null_or_blank(encoded.dictionary)).to_numpy(zero_copy_only=False)
    # Indices among the non-blank labels. Null has the code -1 and therefore selects the last entry.
    indices = np.where(is_label, np.cumsum(is_label) - 1, UNLABELED_CLASS)
    indices = np.append(indices, UNLABELED_CLASS).astype(np.int32)
    codes = pc.fill_null(encoded.indices, UNLABELED_CLASS).to_numpy(zero_copy_only=False)
    column = LabelColumn(
        distinct=encoded.dictionary.filter(pa.array(is_label)),
        codes=indices[codes],
        blank_rows=int(((indices[codes] == UNLABELED_CLASS) & (codes != UNLABELED_CLASS)).sum()),
    )
    if len(column.distinct) == 0:
        raise InputError(
            f"column {name}: all {len(codes)} rows are null or blank; training and evaluation need labels; name "
            "the column with the true class names with --label-column"
        )
    return column


def blank_to_null(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the labels with null for those that are empty or only whitespace."""
    return pc.if_else(_is_null_or_blank(labels), pa.scalar(None, labels.type), labels)


def _is_null_or_blank(labels: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    is_blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(labels)), 0)
    return pc.fill_null(is_blank, True)
