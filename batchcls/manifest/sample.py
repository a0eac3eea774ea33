"""Take a sample of a manifest that is spread evenly over its rows."""

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
"""The column of a sample with class names."""

_ROWS_PER_TABLE = 1024


@dataclass(frozen=True, slots=True)
class RowSample:
    """Rows of the manifest, not yet fetched.

    Attributes:
        rows: row, item_id, uri, image and uri_fault as `manifest.FragmentReader` gives them, and `label` as text
            where the manifest has labels, null for blank labels; in the manifest's order.
        base: the folder that relative uris are resolved against.
    """

    rows: pa.Table
    base: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 over what names the images, where they lie, and their labels; hexadecimal.

        An image that stands in the manifest itself counts with its bytes.
        """
        digest = hashlib.sha256(os.fsencode(canonical_location(self.base)))
        named = (
            self.rows.column(name).to_pylist()
            for name in self.rows.column_names
            if name not in (ROW, URI_FAULT)
        )
        for values in zip(*named, strict=True):
            for value in values:
                data = value if isinstance(value, bytes) else repr(value).encode()
                digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()


def evenly_spaced_rows(rows: int, count: int) -> list[int]:
    """`count` numbers of 0..rows-1 at equal distances, ascending; all of them where there are fewer."""
    if count >= rows:
        return list(range(rows))
    # The middles of `count` equal stretches: neither the head nor the tail is favored.
    return [(2 * place + 1) * rows // (2 * count) for place in range(count)]


def take_sample(manifest: Manifest, count: int, storage: Storage) -> RowSample:
    """Read `count` rows of the manifest, spread evenly over it.

    Only row groups that hold one of them are read; of inline images these are read in streams.

    Args:
        manifest: opened with no kept column, or with one: the labels.
        count: at most so many rows.
        storage: how to reach the manifest.

    Raises:
        InputError: a file of the manifest cannot be read, labels are no text, or text is no UTF-8.
    """
    if manifest.columns.kept:
        manifest = with_text_labels(manifest)
    reader = FragmentReader(manifest.columns, storage)
    wanted = np.array(evenly_spaced_rows(manifest.rows, count))
    tables: list[pa.Table] = []
    for row_group in manifest.fragments(repeat(manifest.rows)):
        first, last = np.searchsorted(wanted, (row_group.first_row, row_group.first_row + row_group.rows))
        if first < last:
            tables += _rows_of(row_group, wanted[first:last].tolist(), reader)
    rows = pa.concat_tables(tables).combine_chunks()
    columns = {name: rows.column(name) for name in (ROW, ITEM_ID, URI, IMAGE, URI_FAULT)}
    for field in manifest.columns.kept:
        columns[LABEL] = blank_to_null(rows.column(field.name))
    return RowSample(pa.table(columns), manifest.base)


def _rows_of(row_group: Fragment, wanted: Sequence[int], reader: FragmentReader) -> Iterator[pa.Table]:
    skipped, span = wanted[0] - row_group.first_row, wanted[-1] - wanted[0] + 1
    stretch = Fragment(
        row_group.uri, row_group.row_group, row_group.offset + skipped, span, row_group.first_row + skipped
    )
    for table in reader.read(stretch, _ROWS_PER_TABLE):
        first = table.column(ROW)[0].as_py()
        inside = [row - first for row in wanted if first <= row < first + table.num_rows]
        if inside:
            yield table.take(inside)
