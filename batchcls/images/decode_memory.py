"""Memory of decoding: what an image takes by its header, and a budget that all images in flight share.

The bytes a pixel are the peaks of the process, measured from the file to the network's input for every
mode that Pillow writes (`tests/contract/test_decode_memory.py` measures them again): the decoder's own
buffers, Pillow's image of four bytes a pixel, its copies on the way to RGB, and the array.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from batchcls.images.decode import reduction_factor
from batchcls.images.formats import Format, Header
from batchcls.images.jpeg_header import has_several_scans
from batchcls.images.load_config import DecodeLimits, MinDecodedSize

_BYTES_A_PIXEL: dict[Format, int] = {
    Format.JPEG: 17,  # through Pillow; plain JPEG takes less, see `_plain_jpeg`
    Format.PNG: 24,
    Format.WEBP: 33,
    Format.GIF: 21,
    Format.BMP: 17,
    Format.TIFF: 25,
    Format.AVIF: 28,
    Format.HEIC: 24,
}
_OPAQUE_PNG, _OPAQUE_WEBP = 17, 25
_MOST_BYTES_A_PIXEL = 40  # of a format that is not listed
_COPIES_OF_THE_FILE = 2
# Of a coefficient, which a JPEG in several scans keeps of each component until the last one.
_COEFFICIENT_BYTES = 2
_LEAST_BYTES = 1 << 20


def estimate_decode_bytes(data: bytes, header: Header, least: MinDecodedSize | None = None) -> int:
    """The most memory that decoding and transforming an image takes, in bytes, beside the file itself.

    `least` is that of `decode.decode`: with it a plain JPEG is decoded at a reduced scale.
    """
    if header.jpeg is not None and header.jpeg.is_plain:
        pixels = _plain_jpeg(data, header, least)
    else:
        pixels = header.allocated_pixels * _bytes_a_pixel(data, header.format)
    return _LEAST_BYTES + pixels + header.overhead_bytes + _COPIES_OF_THE_FILE * len(data)


def max_decode_bytes(limits: DecodeLimits, max_file_bytes: int) -> int:
    """The most memory that any image within the limits may take, in bytes."""
    return _LEAST_BYTES + limits.max_pixels * _MOST_BYTES_A_PIXEL + _COPIES_OF_THE_FILE * max_file_bytes


def _plain_jpeg(data: bytes, header: Header, least: MinDecodedSize | None) -> int:
    frame = header.jpeg
    assert frame is not None
    factor = 1
    if least is not None:
        # Which way up it is shown is not known yet: the scale that is right for both.
        sizes = ((header.height, header.width), (header.width, header.height))
        turned = bool(frame.app1_segments)
        factor = min(reduction_factor(size, least(*size), whole=turned) for size in sizes[: 1 + turned])
    copies = 2 if frame.app1_segments else 1
    pixels = 3 * copies * header.allocated_pixels // factor**2
    if has_several_scans(data, frame):
        pixels += _COEFFICIENT_BYTES * len(frame.component_ids) * header.allocated_pixels
    return pixels


def _bytes_a_pixel(data: bytes, kind: Format) -> int:
    if kind == Format.PNG and data[25] in (0, 2) and data.find(b"tRNS", 0, data.find(b"IDAT")) < 0:
        return _OPAQUE_PNG
    if kind == Format.WEBP and data[12:16] == b"VP8 ":
        return _OPAQUE_WEBP
    return _BYTES_A_PIXEL.get(kind, _MOST_BYTES_A_PIXEL)


class MemoryBudget:
    """Bytes that the threads of a process share: who asks for more than is left waits for the others.

    They are served in the order in which they asked, so that a large image is not passed by small ones
    for ever. One that is larger than the whole budget has it alone. A thread holds one share at a time.
    """

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._in_use = 0
        self._most = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def peak_bytes(self) -> int:
        """The most that was in use at a time so far."""
        with self._changed:
            return self._most

    @contextmanager
    def reserve(self, n_bytes: int) -> Iterator[None]:
        """Hold so many bytes for as long as the context lasts."""
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._has_room(n_bytes))
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()  # the next one may have room beside this one
            self._in_use += n_bytes
            self._most = max(self._most, self._in_use)
        try:
            yield
        finally:
            with self._changed:
                self._in_use -= n_bytes
                self._changed.notify_all()

    def _has_room(self, n_bytes: int) -> bool:
        return not self._in_use or self._in_use + n_bytes <= self._n_bytes
