"""Decodes the images of a manifest once into uint8 arrays that training reads in random order.

They are fetched and decoded by the code of the classifying job, by tasks all over the cluster, and lie
in parts in the work directory: PART.npy with N x H x W x 3, and PART.json, written last, with the rows
that have failed. A part that is there is not made again. Needs no Ray.
"""

import hashlib
import io
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray

from batchcls.comparison.sample_pixels import pixels_key
from batchcls.errors import BudgetExceeded, InputError
from batchcls.images.load_config import LoadSettings
from batchcls.images.loader import Loader
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.ids import InvalidIds
from batchcls.manifest.snapshot import Columns, Fragment, Manifest
from batchcls.preprocessing import Preprocessing
from batchcls.schema import PIXELS, REASONS, ROW, Failure, Reason
from batchcls.storage.documents import Count, Document, DocumentError
from batchcls.storage.filesystem import Storage, explain, is_remote, join, local_path, redact_uri
from batchcls.training.node_cache import NodeCache

PART_ROWS = 512
"""Images of a part: 100 MB at 256 x 256."""

_OPEN_FILES = 64

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PixelPart:
    """One part: the rows of a fragment, and the two files that hold them, without their suffix."""

    fragment: Fragment
    uri: str


class PreparedPart(Document):
    """PART.json: the rows of a part, and the reason and detail of each failed row by row number."""

    format: Literal["batchcls-pixels"] = "batchcls-pixels"
    first_row: Count
    rows: Count
    failures: dict[int, tuple[str, str]]


def uncropped(preprocessing: Preprocessing) -> Preprocessing:
    """The preprocessing that keeps all that the resize gives, for training to crop from.

    Of an image that is not square, the middle square remains: the part that crops of the classifying
    job are taken from.
    """
    return preprocessing.model_copy(
        update={
            "input_height": max(preprocessing.resize_height, preprocessing.input_height),
            "input_width": max(preprocessing.resize_width, preprocessing.input_width),
        }
    )


def pixel_folder(state: str, manifest: Manifest, settings: LoadSettings) -> str:
    """Where the parts of a manifest lie: the name changes with all that changes a pixel."""
    decided = [
        manifest.fingerprint,
        manifest.base,
        pixels_key(settings.preprocessing).model_dump_json(),
        repr((settings.limits, settings.fetch.addresses, settings.fetch.max_bytes, settings.decode_margin)),
    ]
    return join(state, "pixels", hashlib.sha256("\0".join(decided).encode()).hexdigest()[:16])


def pixel_parts(manifest: Manifest, folder: str) -> list[PixelPart]:
    """The parts of a manifest, in the order of its rows."""
    fragments = manifest.fragments(iter(lambda: PART_ROWS, None))
    return [
        PixelPart(fragment, join(folder, f"part-{number:06d}")) for number, fragment in enumerate(fragments)
    ]


def prepare_part(
    part: PixelPart,
    columns: Columns,
    storage: Storage,
    settings: LoadSettings,
    rejected: Mapping[int, Failure],
) -> PreparedPart:
    """Fetch and decode a part's images and write them, unless that has been done.

    Args:
        part: which rows, and where to.
        columns: of the manifest.
        storage: how to reach manifest and state.
        settings: how images are loaded.
        rejected: rows that have failed before they are fetched.
    """
    found = read_prepared_part(part, storage)
    if found is not None:
        return found
    shape = settings.preprocessing.shape
    reader = FragmentReader(columns, storage)
    tables = reader.read(part.fragment, settings.block_rows)
    pixels = np.zeros((part.fragment.rows, *shape), np.uint8)
    failures: dict[int, tuple[str, str]] = {}
    for block in Loader(settings).load(tables, rejected):
        _take(block, part.fragment.first_row, pixels, failures)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    prepared = PreparedPart(first_row=part.fragment.first_row, rows=part.fragment.rows, failures=failures)
    with explain(part.uri):
        storage.write_atomic(f"{part.uri}.npy", buffer.getvalue())
        storage.write_atomic(f"{part.uri}.json", prepared.to_json(indent=None))
    return prepared


def read_prepared_part(part: PixelPart, storage: Storage) -> PreparedPart | None:
    """The record of a part that was prepared before; None if there is none, or if it is damaged."""
    try:
        return PreparedPart.from_json(storage.read_bytes(f"{part.uri}.json"))
    except (FileNotFoundError, DocumentError):
        return None


def _take(block: pa.Table, first_row: int, pixels: Pixels, failures: dict[int, tuple[str, str]]) -> None:
    rows = block.column(ROW).to_pylist()
    reasons, details = (block.column(name).to_pylist() for name in ("reason", "detail"))
    for place, value in enumerate(block.column(PIXELS)):
        row = rows[place]
        if value.is_valid:
            image = np.frombuffer(value.as_buffer(), np.uint8)
            pixels[row - first_row] = image.reshape(pixels.shape[1:])
        else:
            failures[row] = (reasons[place], details[place])


class PixelStore:
    """The images of a manifest by row number; may be used in processes that are forked off or that it is sent to.

    What is open at a time is bounded, however many parts there are.
    """

    def __init__(self, uris: Sequence[str], storage: Storage, local_folder: str) -> None:
        """Find the parts, and copy those that lie on a store.

        Args:
            uris: of the parts in the order of the rows, without suffix.
            storage: how to reach them.
            local_folder: where parts of a remote work directory are copied to, by the first process that asks.

        Raises:
            InputError: a part is not there, is damaged, or there is no room for it.
        """
        cache = NodeCache(Path(local_folder))
        # Processes that copy at once begin at different parts.
        first = os.getpid() % max(1, len(uris))
        for uri in (*uris[first:], *uris[:first]):
            if is_remote(uri):
                cache.copy(f"{uri}.npy", storage)
        self._parts = [_Stored.at(_on_disk(f"{uri}.npy", storage, cache)) for uri in uris]
        self._starts = np.cumsum([0, *(part.shape[0] for part in self._parts)])
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Pixels:
        """H x W x 3 of a row; a copy, which may be written to."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        part = self._parts[number]
        image = np.empty(part.shape[1:], np.uint8)
        place = part.offset + int(row - self._starts[number]) * image.nbytes
        # Read at a place and not from the file's position, which processes that were forked off share.
        if os.preadv(self._file(number), [image.data], place) != image.nbytes:
            raise InputError(f"{part.path} is cut off; remove it, and the same command prepares it again")
        return image

    def __getstate__(self) -> dict[str, object]:
        """What a process that is started afresh is given: it opens the files itself, its descriptors are others."""
        return self.__dict__ | {"_open": OrderedDict()}

    def close(self) -> None:
        """Close the files; what is read afterwards opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, number: int) -> int:
        """The descriptor of a part; the one that was not used for longest makes room for it."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[number] = os.open(self._parts[number].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[number]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A file of numpy's with N,H,W,3 uint8 from the byte `offset` on."""

    path: Path
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def at(cls, path: Path) -> "_Stored":
        with path.open("rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            except ValueError as error:
                raise InputError(
                    f"{path} is damaged ({error}); remove it, and the same command prepares it again"
                ) from error
            offset = file.tell()
        if fortran or dtype != np.uint8 or len(shape) != 4:
            raise InputError(f"{path} holds {dtype} {shape}, which are no images; remove it")
        return cls(path, shape, offset)


def _on_disk(uri: str, storage: Storage, cache: NodeCache) -> Path:
    if is_remote(uri):
        return cache.copy(uri, storage)
    path = Path(local_path(uri))
    if not path.is_file():
        raise InputError(
            f"{uri} is not on this node: with more than one node --work-dir has to be a folder that all of them "
            "share, or on a store such as s3://"
        )
    return path


_RETRIES = 3
_WAITING_TASKS_A_CPU = 2

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedPixels:
    """Where the images of a manifest lie, and which are missing.

    Attributes:
        folder: with the parts.
        uris: of the parts, in the order of the rows, without suffix.
        failed: reason and detail by row number.
    """

    folder: str
    uris: tuple[str, ...]
    failed: Mapping[int, tuple[str, str]]

    def has_image(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """For row numbers: whether there is an image."""
        return ~np.isin(rows, np.fromiter(self.failed, np.int64, len(self.failed)))


def prepare_pixels(
    manifest: Manifest,
    bad_ids: InvalidIds,
    settings: LoadSettings,
    place: tuple[str, Storage],
    tell: Callable[[int], None],
) -> PreparedPixels:
    """Fetch, decode and write every image that is not there yet.

    Args:
        manifest: whose images.
        bad_ids: its rows without an id of their own, which are left out.
        settings: how images are loaded.
        place: work directory and how to reach it.
        tell: called with the number of rows done so far.
    """
    state, storage = place
    # Labels are read elsewhere.
    columns = manifest.without_kept().columns
    folder = pixel_folder(state, manifest, settings)
    parts = pixel_parts(manifest, folder)
    shared = ray.put((columns, storage, replace(settings, kept=())))
    done = 0
    failed: dict[int, tuple[str, str]] = {}
    for outcome in _run(parts, bad_ids, shared):
        done += outcome.rows
        failed |= outcome.failures
        tell(done)
    return PreparedPixels(folder, tuple(part.uri for part in parts), failed)


def _run(parts: Sequence[PixelPart], bad_ids: InvalidIds, shared: Any) -> Iterator[PreparedPart]:
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_prepare)
    most = max(1, int(ray.cluster_resources().get("CPU", 1))) * _WAITING_TASKS_A_CPU
    waiting: list[Any] = []
    for part in parts:
        first = part.fragment.first_row
        waiting.append(task.remote(part, shared, bad_ids.between(first, first + part.fragment.rows)))
        if len(waiting) >= most:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)
    while waiting:
        ready, waiting = ray.wait(waiting)
        yield from ray.get(ready)


def _prepare(part: PixelPart, shared: Any, rejected: Mapping[int, Any]) -> PreparedPart:
    columns, storage, settings = shared
    return prepare_part(part, columns, storage, settings, rejected)


def check_failures(which: str, pixels: PreparedPixels, rows: int, most: float) -> None:
    """Say how many images cannot be used, and why.

    Raises:
        BudgetExceeded: they are more than the share `most` of the rows.
    """
    if not pixels.failed:
        return
    counts = Counter(reason for reason, _ in pixels.failed.values())
    reasons = "; ".join(
        f"{reason}={count} ({REASONS[Reason(reason)].meaning})" for reason, count in counts.most_common()
    )
    share = len(pixels.failed) / rows
    first = ", ".join(f"row {row}" for row in sorted(pixels.failed)[:5])
    message = (
        f"{len(pixels.failed)} of {rows} {which} images cannot be used ({share:.2%}): {reasons}; {first}"
    )
    if share > most:
        raise BudgetExceeded(
            f"{message}; more than --max-failed-fraction {most:g} allows. The prepared images are in "
            f"{redact_uri(pixels.folder)}"
        )
    _logger.warning("%s; they are left out", message)
