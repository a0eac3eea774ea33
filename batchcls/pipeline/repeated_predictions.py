"""Predictions of rows that repeat the image of another row: copied, so that each image is predicted once.

A process remembers the outcomes of the images that it has seen last (`KnownPredictions`). A row of a fragment repeats
another one if its image, by content, was predicted earlier in the process or occurs earlier in the fragment.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchcls.errors import BatchclsError
from batchcls.images.loader import pack_pixels
from batchcls.runs.parts import COMPUTED, SHARED
from batchcls.schema import LARGE_PIXELS, PIXELS, Reason

_MAX_KNOWN_ROWS = 4096
_FILL_BLOCKS = 4
_CONTENT = "content_hash"
_Source = tuple[pa.Table, int]
"""A block and the position of one of its rows."""


class KnownPredictions:
    """The outcomes of the images that a process has predicted last, by content hash; methods are thread-safe."""

    def __init__(self, columns: Sequence[str], max_rows: int = _MAX_KNOWN_ROWS) -> None:
        """Initialize without any image.

        Args:
            columns: columns of predicted blocks that follow from the image, which are copied to repeated rows.
            max_rows: number of rows beyond which the oldest blocks are forgotten.
        """
        self.columns = tuple(columns)
        self._max_rows = max_rows
        self._lock = threading.Lock()
        self._blocks: deque[pa.Table] = deque()
        self._rows = 0
        self._sources: dict[str, _Source] = {}

    def find(self, content_hash: str) -> _Source | None:
        """Return where the outcome of an image is; None if it is not known."""
        with self._lock:
            return self._sources.get(content_hash)

    def add(self, block: pa.Table) -> None:
        """Remember the images of a predicted block, except those that failed for want of time."""
        timeout = Reason.DECODE_TIMEOUT.value
        rows = {content: row for content, row, reason in _outcomes(block) if reason != timeout}
        # A copy: columns of a block from the object store would keep the block there, with all its pixels.
        block = block.select([_CONTENT, *self.columns]).take(pa.array(list(rows.values()), pa.int64()))
        with self._lock:
            self._sources |= {content: (block, row) for row, content in enumerate(rows)}
            self._blocks.append(block)
            self._rows += block.num_rows
            while self._rows > self._max_rows and len(self._blocks) > 1:
                self._forget(self._blocks.popleft())

    def _forget(self, block: pa.Table) -> None:
        self._rows -= block.num_rows
        for content in block.column(_CONTENT).to_pylist():
            source = self._sources.get(content)
            if source is not None and source[0] is block:  # a newer block may have the image as well
                del self._sources[content]


class RepeatedPredictions:
    """Completes the predicted blocks of one fragment, which must be passed in order."""

    def __init__(self, known: KnownPredictions) -> None:
        self._known = known
        self._pinned: dict[str, _Source] = {}
        self._fragment: dict[str, _Source] = {}

    def is_known(self, content_hash: str) -> bool:
        """Whether a row with this image can be completed without pixels, whatever is forgotten meanwhile."""
        if content_hash not in self._pinned:
            source = self._known.find(content_hash)
            if source is None:
                return False
            self._pinned[content_hash] = source
        return True

    def drop_pixels(self, block: pa.Table) -> pa.Table:
        """Drop the pixels of the rows of a block that repeat an earlier row of it or a known content."""
        seen: set[str] = set()
        is_kept = []
        for content, is_valid in zip(
            block.column(_CONTENT).to_pylist(), block.column(PIXELS).is_valid().to_pylist(), strict=True
        ):
            is_kept.append(not is_valid or content is None or not (content in seen or self.is_known(content)))
            seen.add(content)
        if all(is_kept):
            return block
        for name in {PIXELS, LARGE_PIXELS}.intersection(block.column_names):
            position = block.schema.get_field_index(name)
            images = [
                np.frombuffer(value.as_buffer(), np.uint8) if kept and value.is_valid else None
                for value, kept in zip(block.column(name), is_kept, strict=True)
            ]
            block = block.set_column(position, block.schema.field(position), pack_pixels(images))
        return block

    def complete(self, block: pa.Table) -> pa.Table:
        """Return a predicted block with the outcomes of its repeated rows, and with the column `origin`.

        Raises:
            BatchclsError: the outcome of a repeated row is not known.
        """
        contents = block.column(_CONTENT).to_pylist()
        is_repeat = pc.and_(
            block.column("reason").is_null(), block.column("probability").is_null()
        ).to_numpy()
        for content, row, _ in _outcomes(block):
            self._fragment.setdefault(content, (block, row))
        repeats = np.flatnonzero(is_repeat)
        if len(repeats):
            sources = {int(row): self._source(contents[row]) for row in repeats}
            block = _copy_outcomes(block, sources, self._known.columns)
        self._known.add(block)
        return block.append_column("origin", pc.if_else(pa.array(is_repeat), SHARED, COMPUTED))

    def _source(self, content: str) -> _Source:
        source = self._fragment.get(content) or self._pinned.get(content)
        if source is None:
            raise BatchclsError(f"no prediction is known for a repeated image, SHA-256 {content}")
        return source


def fill_blocks(blocks: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in blocks with `rows` decoded images each, so that the batches of the network are full.

    Blocks in which each row has pixels are passed on as they are. Other blocks have at most `rows` decoded images and,
    so that progress is reported, not many more rows in all.
    """
    pending: list[pa.Table] = []
    for block in blocks:
        if not pending and block.column(PIXELS).null_count == 0:
            yield block
            continue
        pending.append(block)
        table = pa.concat_tables(pending)
        decoded = np.cumsum(table.column(PIXELS).is_valid().to_numpy())
        while len(decoded) and (decoded[-1] >= rows or len(decoded) >= _FILL_BLOCKS * rows):
            stop = int(np.searchsorted(decoded, rows)) + 1 if decoded[-1] >= rows else len(decoded)
            yield table.slice(0, stop).combine_chunks()
            table = table.slice(stop)
            decoded = decoded[stop:] - decoded[stop - 1]
        pending = [table] if table.num_rows else []
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def _outcomes(block: pa.Table) -> Iterator[tuple[str, int, str | None]]:
    """Yield the content hash, the position and the reason of each row whose image was predicted or failed."""
    columns = (block.column(name).to_pylist() for name in (_CONTENT, "reason", "probability"))
    for row, (content, reason, probability) in enumerate(zip(*columns, strict=True)):
        if content is not None and not (reason is None and probability is None):
            yield content, row, reason


def _copy_outcomes(block: pa.Table, sources: Mapping[int, _Source], columns: Sequence[str]) -> pa.Table:
    """Return the block with these columns of the sources copied into its rows, by position."""
    indices = np.arange(block.num_rows)
    pieces, start = [block.select(columns)], block.num_rows
    tables = {id(table): table for table, _ in sources.values()}
    for key, table in tables.items():
        targets = [target for target, source in sources.items() if id(source[0]) == key]
        pieces.append(table.select(columns).take(pa.array([sources[target][1] for target in targets])))
        indices[targets] = np.arange(start, start + len(targets))
        start += len(targets)
    completed = pa.concat_tables(pieces).take(pa.array(indices))
    for name in columns:
        position = block.schema.get_field_index(name)
        block = block.set_column(position, block.schema.field(position), completed.column(name))
    return block
