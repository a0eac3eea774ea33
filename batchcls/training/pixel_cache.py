"""Decodes the images of a manifest once into uint8 arrays that training reads in random order.

The images are fetched and decoded with the same code as in `classify`, and written as parts to the work directory:
PART.npy with an array of shape (N, H, W, 3), and PART.json, written last, with the failed rows. Existing
parts are not prepared again.
"""

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from batchcls.comparison.sample_pixels import pixels_key
from batchcls.errors import InputError
from batchcls.images.load_config import LoadSettings
from batchcls.images.loader import Loader
from batchcls.manifest.fragment_reader import FragmentReader
from batchcls.manifest.snapshot import Columns, Fragment, Manifest
from batchcls.preprocessing import Preprocessing
from batchcls.schema import PIXELS, ROW, Failure
from batchcls.storage.documents import Count, Document, DocumentError
from batchcls.storage.filesystem import Storage, explain, is_remote, join, local_path
from batchcls.training.node_cache import NodeCache

PART_ROWS = 512
"""Images per part: 100 MB at 256 x 256."""

_OPEN_FILES = 64

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PixelPart:
    """A part: the rows of a fragment, and the URI of its two files without suffix."""

    fragment: Fragment
    uri: str


class PreparedPart(Document):
    """PART.json: the rows of a part, and the reason and detail of each failed row by row number."""

    format: Literal["batchcls-pixels"] = "batchcls-pixels"
    first_row: Count
    rows: Count
    failures: dict[int, tuple[str, str]]


def uncropped(preprocessing: Preprocessing) -> Preprocessing:
    """Return the preprocessing without the center crop, so that training can take its own crops.

    Of an image that is not square, the central square remains, which also contains the crops of `classify`.
    """
    return preprocessing.model_copy(
        update={
            "input_height": max(preprocessing.resize_height, preprocessing.input_height),
            "input_width": max(preprocessing.resize_width, preprocessing.input_width),
        }
    )


def center(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Cut the center of `size` (height, width) out of an image (H, W, 3) with `uncropped` preprocessing.

    The result is the image that `classify` passes to the network. If it is padded and cropped, it may be shifted by one
    pixel.
    """
    top, left = (round((side - crop) / 2) for side, crop in zip(pixels.shape, size, strict=False))
    return pixels[top : top + size[0], left : left + size[1]]


def pixel_folder(work_dir: str, manifest: Manifest, settings: LoadSettings) -> str:
    """Return the folder of the parts of a manifest. Its name depends on everything that affects the pixels."""
    key = [
        manifest.fingerprint,
        manifest.base,
        pixels_key(settings.preprocessing).model_dump_json(),
        repr((settings.limits, settings.fetch.addresses, settings.fetch.max_bytes, settings.decode_margin)),
    ]
    return join(work_dir, "pixels", hashlib.sha256("\0".join(key).encode()).hexdigest()[:16])


def pixel_parts(manifest: Manifest, folder: str) -> list[PixelPart]:
    """Return the parts of a manifest in row order."""
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
    """Fetch, decode and write the images of a part, unless it exists.

    Args:
        part: the rows and the destination.
        columns: columns of the manifest.
        storage: storage that holds the manifest and the work directory.
        settings: how images are loaded.
        rejected: failures of rows that are not to be fetched.
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
        _collect(block, part.fragment.first_row, pixels, failures)
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    prepared = PreparedPart(first_row=part.fragment.first_row, rows=part.fragment.rows, failures=failures)
    with explain(part.uri):
        storage.write_atomic(f"{part.uri}.npy", buffer.getvalue())
        storage.write_atomic(f"{part.uri}.json", prepared.to_json(indent=None))
    return prepared


def read_prepared_part(part: PixelPart, storage: Storage) -> PreparedPart | None:
    """Read the record of a part that was prepared before, or None if it does not exist or is damaged."""
    try:
        return PreparedPart.from_json(storage.read_bytes(f"{part.uri}.json"))
    except (FileNotFoundError, DocumentError):
        return None


def _collect(block: pa.Table, first_row: int, pixels: Pixels, failures: dict[int, tuple[str, str]]) -> None:
    rows = block.column(ROW).to_pylist()
    reasons, details = (block.column(name).to_pylist() for name in ("reason", "detail"))
    for position, value in enumerate(block.column(PIXELS)):
        row = rows[position]
        if value.is_valid:
            image = np.frombuffer(value.as_buffer(), np.uint8)
            pixels[row - first_row] = image.reshape(pixels.shape[1:])
        else:
            failures[row] = (reasons[position], details[position])


class PixelStore:
    """Random access to the images of a manifest by row number. It can be forked and pickled.

    The number of open files is limited, independent of the number of parts.
    """

    def __init__(self, uris: Sequence[str], storage: Storage, local_folder: str) -> None:
        """Open the parts, and copy remote parts to the local disk.

        Args:
            uris: URIs of the parts in row order, without suffix.
            storage: storage that holds the parts.
            local_folder: destination of remote parts, which are copied by the first process that needs them.

        Raises:
            InputError: a part does not exist or is damaged, or the disk is full.
        """
        cache = NodeCache(Path(local_folder))
        # Processes that copy at the same time start with different parts.
        first = os.getpid() % max(1, len(uris))
        for uri in (*uris[first:], *uris[:first]):
            if is_remote(uri):
                cache.copy(f"{uri}.npy", storage)
        self._parts = [_PixelFile.at(_on_disk(f"{uri}.npy", storage, cache)) for uri in uris]
        self._starts = np.cumsum([0, *(part.shape[0] for part in self._parts)])
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Pixels:
        """The image of a row, of shape (H, W, 3); a writable copy."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        part = self._parts[number]
        image = np.empty(part.shape[1:], np.uint8)
        position = part.offset + int(row - self._starts[number]) * image.nbytes
        # Read at an absolute offset, because forked processes share the position of the file.
        if os.preadv(self._file(number), [image.data], position) != image.nbytes:
            raise InputError(f"{part.path} is truncated; remove it and run the same command again")
        return image

    def __getstate__(self) -> dict[str, object]:
        """State without file descriptors, which are not valid in another process."""
        return self.__dict__ | {"_open": OrderedDict()}

    def close(self) -> None:
        """Close all files. Later reads open them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _file(self, number: int) -> int:
        """Return the file descriptor of a part; the least recently used one is closed if there are too many."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        self._open[number] = os.open(self._parts[number].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[number]


@dataclass(frozen=True, slots=True)
class _PixelFile:
    """A NumPy file with a uint8 array of shape (N, H, W, 3) that starts at the byte `offset`."""

    path: Path
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def at(cls, path: Path) -> "_PixelFile":
        with path.open("rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            except ValueError as error:
                raise InputError(
                    f"{path} is damaged ({error}); remove it and run the same command again"
                ) from error
            offset = file.tell()
        if fortran or dtype != np.uint8 or len(shape) != 4:
            raise InputError(
                f"{path} contains {dtype} {shape} instead of images; remove it and run the same command again"
            )
        return cls(path, shape, offset)


def _on_disk(uri: str, storage: Storage, cache: NodeCache) -> Path:
    if is_remote(uri):
        return cache.copy(uri, storage)
    path = Path(local_path(uri))
    if not path.is_file():
        raise InputError(
            f"{uri} does not exist on this node: with more than one node, --work-dir must be a folder that all of them "
            "share, or a remote store such as s3://"
        )
    return path
