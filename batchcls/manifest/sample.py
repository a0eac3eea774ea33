"""Read an evenly spaced sample of the rows of a manifest."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import pyarrow as pa

from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.labeled_manifest import blank_to_null, with_text_labels
from batchcls.manifest.snapshot import Fragment, Manifest
from batchcls.schema import IMAGE, ITEM_ID, ROW, URI, URI_FAULT
from batchcls.storage.filesystem import Storage
from batchcls.storage.uris import canonical_location

LABEL = "label"
"""Column of a sample that contains class names."""

_ROWS_PER_TABLE = 1024


@dataclass(frozen=True, slots=True)
class RowSample:
    """Sampled rows of the manifest, whose images are not fetched yet.

    Attributes:
        rows: row, item_id, uri, image and uri_fault as read by `manifest.FragmentReader`, in the order of the
            manifest, and the text column `label` if the manifest has labels, null for blank labels.
        base: folder against which relative URIs are resolved.
    """

    rows: pa.Table
    base: str

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of ids, URIs, inline images, labels and the base."""
        digest = hashlib.sha256(os.fsencode(canonical_location(self.base)))
        columns = (
            self.rows.column(name).to_pylist()
            for name in self.rows.column_names
            if name not in (ROW, URI_FAULT)
        )
        for values in zip(*columns, strict=True):
            for value in values:
                data = value if isinstance(value, bytes) else repr(value).encode()
                digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()


def evenly_spaced_rows(rows: int, count: int) -> list[int]:
    """Return `count` evenly spaced numbers of 0..rows-1 in ascending order, or all if there are fewer."""
    if count >= rows:
        return list(range(rows))
    # The middles of `count` equal intervals, so that neither end is favored.
    return [(2 * index + 1) * rows // (2 * count) for index in range(count)]


def take_sample(manifest: Manifest, count: int, storage: Storage) -> RowSample:
    """Read `count` evenly spaced rows of the manifest.

    Only row groups that contain sampled rows are read; those with inline images are streamed.

    Args:
        manifest: manifest without kept columns, or with the label column as the only one.
        count: maximum number of rows.
        storage: storage that holds the manifest.

    Raises:
        InputError: a file cannot be read, labels are not text, or text is not valid UTF-8.
    """
    if manifest.columns.kept:
        manifest = with_text_labels(manifest)
    reader = FragmentReader(manifest.columns, storage)
    sampled = np.array(evenly_spaced_rows(manifest.rows, count))
    tables: list[pa.Table] = []
    for row_group in manifest.fragments(repeat(manifest.rows)):
        first, last = np.searchsorted(sampled, (row_group.first_row, row_group.first_row + row_group.rows))
        if first < last:
            tables += _read_rows(row_group, sampled[first:last].tolist(), reader)
    rows = pa.concat_tables(tables).combine_chunks()
    columns = {name: rows.column(name) for name in (ROW, ITEM_ID, URI, IMAGE, URI_FAULT)}
    for field in manifest.columns.kept:
        columns[LABEL] = blank_to_null(rows.column(field.name))
    return RowSample(pa.table(columns), manifest.base)


def _read_rows(row_group: Fragment, numbers: Sequence[int], reader: FragmentReader) -> Iterator[pa.Table]:
    skipped, span = numbers[0] - row_group.first_row, numbers[-1] - numbers[0] + 1
    fragment = Fragment(
        row_group.uri, row_group.row_group, row_group.offset + skipped, span, row_group.first_row + skipped
    )
    for table in reader.read(fragment, _ROWS_PER_TABLE):
        first = table.column(ROW)[0].as_py()
        indices = [row - first for row in numbers if first <= row < first + table.num_rows]
        if indices:
            yield table.take(indices)
