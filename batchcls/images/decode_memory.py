"""Memory of decoding: an estimate from the header, and a budget shared by all images that are decoded concurrently.

The bytes per pixel are peaks of the process, measured from the file to the input of the network for every mode that
Pillow writes (`tests/contract/test_decode_memory.py` repeats the measurement): the buffers of the decoder, Pillow's
image of four bytes per pixel, its copies during the conversion to RGB, and the array.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from batchcls.images.decode import reduction_factor
from batchcls.images.formats import Format, Header, JpegFrame
from batchcls.images.jpeg_header import has_several_scans
from batchcls.images.load_config import DecodeLimits, MinDecodedSize

_BYTES_PER_PIXEL: dict[Format, int] = {
    Format.JPEG: 17,  # if decoded by Pillow; plain JPEG needs less, see `_plain_jpeg_bytes`
    Format.PNG: 28,
    Format.WEBP: 33,
    Format.GIF: 24,
    Format.BMP: 17,
    Format.TIFF: 25,
    Format.AVIF: 28,
    Format.HEIC: 24,
}
_OPAQUE_PNG, _OPAQUE_WEBP = 18, 25
_MAX_BYTES_PER_PIXEL = 40  # of formats that are not listed
_FILE_COPIES = 2
# JPEGs with several scans keep the coefficients of all components until the last scan.
_COEFFICIENT_BYTES = 2
_MIN_BYTES = 1 << 20


def estimate_decode_bytes(data: bytes, header: Header, min_size: MinDecodedSize | None = None) -> int:
    """Upper bound of the memory for decoding and transforming an image, in bytes, without the file itself.

    `min_size` is that of `decode.decode`: a plain JPEG is decoded at a reduced scale.
    """
    if header.jpeg is not None and header.jpeg.is_plain:
        pixels = _plain_jpeg_bytes(data, header, min_size)
    else:
        pixels = header.allocated_pixels * _bytes_per_pixel(data, header)
    return _MIN_BYTES + pixels + header.overhead_bytes + _FILE_COPIES * len(data)


def max_decode_bytes(limits: DecodeLimits, max_file_bytes: int) -> int:
    """Upper bound of the memory for decoding any image within the limits, in bytes."""
    return _MIN_BYTES + limits.max_pixels * _MAX_BYTES_PER_PIXEL + _FILE_COPIES * max_file_bytes


def _plain_jpeg_bytes(data: bytes, header: Header, min_size: MinDecodedSize | None) -> int:
    frame = header.jpeg
    assert frame is not None
    factor = 1
    if min_size is not None:
        # The orientation is not known yet, so the factor must be valid for both.
        sizes = ((header.height, header.width), (header.width, header.height))
        may_rotate = bool(frame.app1_segments)
        factor = min(
            reduction_factor(size, min_size(*size), exact=may_rotate) for size in sizes[: 1 + may_rotate]
        )
    copies = 2 if frame.app1_segments else 1
    pixels = 3 * copies * header.allocated_pixels // factor**2
    return pixels + _coefficient_bytes(data, frame) * header.allocated_pixels


def _coefficient_bytes(data: bytes, frame: JpegFrame) -> int:
    """Bytes per pixel of the coefficients of a JPEG."""
    return _COEFFICIENT_BYTES * len(frame.component_ids) if has_several_scans(data, frame) else 0


def _bytes_per_pixel(data: bytes, header: Header) -> int:
    kind = header.format
    if kind == Format.PNG and data[25] in (0, 2) and data.find(b"tRNS", 0, data.find(b"IDAT")) < 0:
        return _OPAQUE_PNG
    if kind == Format.WEBP and data[12:16] == b"VP8 ":
        return _OPAQUE_WEBP
    coefficients = 0 if header.jpeg is None else _coefficient_bytes(data, header.jpeg)
    return _BYTES_PER_PIXEL.get(kind, _MAX_BYTES_PER_PIXEL) + coefficients


class MemoryBudget:
    """A number of bytes that the threads of a process share; reservations that do not fit wait for others.

    Reservations are granted in order, so that small images do not starve a large one. A reservation larger than the
    budget is granted when there are no others. A thread holds at most one reservation at a time.
    """

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._in_use = 0
        self._peak = 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def peak_bytes(self) -> int:
        """Maximum number of bytes reserved at the same time so far."""
        with self._changed:
            return self._peak

    @contextmanager
    def reserve(self, n_bytes: int) -> Iterator[None]:
        """Reserve bytes for the duration of the context."""
        request = object()
        with self._changed:
            self._waiting.append(request)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is request and self._fits(n_bytes))
            finally:
                self._waiting.remove(request)
                self._changed.notify_all()  # The next request may also fit.
            self._in_use += n_bytes
            self._peak = max(self._peak, self._in_use)
        try:
            yield
        finally:
            with self._changed:
                self._in_use -= n_bytes
                self._changed.notify_all()

    def _fits(self, n_bytes: int) -> bool:
        return not self._in_use or self._in_use + n_bytes <= self._n_bytes
