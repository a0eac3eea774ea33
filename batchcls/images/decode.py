"""Decode image files to RGB pixels, or fail with a reason.

JPEG is decoded by libjpeg-turbo, at a reduced scale if the image is much larger than needed; all other formats are
decoded by Pillow (`batchcls.images.rgb`). Both release the GIL, except Pillow for AVIF. `decode` is thread-safe.

Some damage that decoders ignore is rejected here: JPEG data that ends early in front of an end marker (libjpeg fills
the rest with gray), progressive JPEG with missing scans, PNG data with wrong checksums, AVIF and HEIC data padded with
zeros, and files shorter than their header states.

Some damage cannot be detected at low cost and is accepted: flipped bits in formats other than PNG, if the data can
still be decoded (these formats have no checksums; about nine in ten single bit flips in a JPEG cause no warning even
in libjpeg); missing data of the last block of a sequential JPEG, of the last refinement scan of a progressive JPEG,
or of a CMYK JPEG in front of an added end marker.
"""

import io
import threading
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL.JpegImagePlugin import JpegImageFile

from batchcls.images.formats import DecodeError, Format, Header, JpegFrame
from batchcls.images.headers import read_header
from batchcls.images.jpeg_header import (
    end_of_coded_data,
    has_several_scans,
    require_end_marker,
    scans_are_complete,
    without_metadata,
)
from batchcls.images.load_config import DecodeLimits, MinDecodedSize
from batchcls.images.png_header import png_without_metadata
from batchcls.images.rgb import open_unloaded, orientation_of, orientation_of_metadata, to_rgb
from batchcls.schema import Reason

_FACTORS = (8, 4, 2)
_pillow_lock = threading.Lock()


def reduction_factor(size: tuple[int, int], min_size: tuple[float, float], exact: bool = False) -> int:
    """Largest factor of 1, 2, 4 and 8 by which `size` can be reduced without becoming smaller than `min_size`.

    Both sizes are (height, width). `exact`: the factor must divide height and width without remainder.
    """
    for factor in _FACTORS:
        is_large_enough = all(
            side >= factor * min_side for side, min_side in zip(size, min_size, strict=True)
        )
        if is_large_enough and not (exact and any(side % factor for side in size)):
            return factor
    return 1


def decode_jpeg(data: bytes, header: Header, frame: JpegFrame, factor: int = 1) -> np.ndarray:
    """Decode to uint8 H x W x 3 RGB, C-contiguous, not rotated, reduced by a factor of 1, 2, 4 or 8.

    Damage for which libjpeg only warns is ignored, and missing data becomes gray.

    Raises:
        Exception: any exception of the decoder for other damage.
    """
    if not frame.is_plain:
        return _jpeg_with_pillow(data, header, frame, factor)
    # simplejpeg selects the smallest scale that is at least this large, which is exactly the given factor.
    min_size = {"min_height": -(-header.height // factor), "min_width": -(-header.width // factor)}
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, strict=False, **min_size)
    except ValueError:
        # TurboJPEG treats some warnings that libjpeg issues for the header as errors (stray bytes between segments,
        # inconsistent parts of an ICC profile) and does not support some samplings, such as 4:1:0. The underlying
        # libjpeg decodes them, and so does Pillow, but with four times the memory that was estimated from the
        # header. Therefore only one thread does so at a time.
        with _pillow_lock:
            return _jpeg_with_pillow(data, header, frame, factor)
    return pixels


def _jpeg_with_pillow(data: bytes, header: Header, frame: JpegFrame, factor: int) -> np.ndarray:
    # Pillow has its own parser, which fails on damaged metadata that libjpeg does not read.
    image = JpegImageFile(io.BytesIO(without_metadata(data, frame)))
    if image.size != (header.width, header.height):
        raise DecodeError(Reason.CORRUPT, "the jpeg header contains contradicting sizes")
    if factor > 1:
        image.draft("RGB", (header.width // factor, header.height // factor))
    return np.array(image.convert("RGB"))


__all__ = ["DecodeError", "DecodeLimits", "Decoded", "MinDecodedSize", "decode", "read_checked_header"]

# The check needs three full-scale images, which memory estimates do not include, so one thread does it at a time.
_full_scale_check_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded image.

    `pixels` is uint8 H x W x 3, RGB, upright and C-contiguous. `width` and `height` are those of the stored image,
    before rotation. `extent` is the height and width of the image in units of `pixels`. It equals their shape,
    except if the image was reduced and its last row or column is partly outside the image: 375 rows reduced by 2
    have an extent of 187.5 and fill 188 rows.
    """

    pixels: np.ndarray
    width: int
    height: int
    extent: tuple[float, float]


def read_checked_header(data: bytes, limits: DecodeLimits) -> Header:
    """Read the header of an image and check it against the limits, without decoding.

    Raises:
        DecodeError: see `decode`.
    """
    header = read_header(data)
    _require_size(header, limits)
    return header


def decode(
    data: bytes, limits: DecodeLimits, min_size: MinDecodedSize | None = None, header: Header | None = None
) -> Decoded:
    """Decode the first image of a file.

    Transparent images are composed on white, 16-bit samples keep their upper 8 bits, and the first frame of an
    animation is decoded.

    Args:
        data: content of the file.
        limits: minimum and maximum size of the stored image.
        min_size: minimum size at which a JPEG may be decoded; None: full scale.
        header: result of `read_checked_header`, if already available.

    Raises:
        DecodeError: empty, not_an_image, unsupported_format, truncated, corrupt, too_many_pixels or too_small; the
            detail contains nothing from the file.
        MemoryError: the process is out of memory, for which the file is not responsible.
    """
    header = header or read_checked_header(data, limits)
    try:
        if header.jpeg is not None:
            hwc, orientation, factor = _decode_jpeg(data, header, header.jpeg, min_size)
        else:
            hwc, orientation = _decode_with_pillow(data, header, limits)
            factor = 1
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # Decoders raise arbitrary exceptions for damaged files.
        raise _translated(error, header) from error
    pixels = _upright(hwc, orientation)
    if header.jpeg is None:
        height, width = pixels.shape[:2]
        return Decoded(pixels, *_stored_size(hwc, header), (height, width))
    height, width = _upright_size(header, orientation)
    return Decoded(pixels, header.width, header.height, (height / factor, width / factor))


def _require_size(header: Header, limits: DecodeLimits) -> None:
    size = f"{header.width} x {header.height} pixels"
    if header.allocated_pixels > limits.max_pixels:
        raise DecodeError(
            Reason.TOO_MANY_PIXELS, f"{size} require {header.allocated_pixels}, more than {limits.max_pixels}"
        )
    if min(header.width, header.height) < limits.min_side_pixels:
        raise DecodeError(Reason.TOO_SMALL, f"{size}, a side is shorter than {limits.min_side_pixels}")


def _decode_with_pillow(data: bytes, header: Header, limits: DecodeLimits) -> tuple[np.ndarray, int]:
    try:
        image = open_unloaded(data, header, limits.max_pixels)
        image.load()
    except (SyntaxError, ValueError):
        if header.format != Format.PNG:
            raise
        image = open_unloaded(png_without_metadata(data), header, limits.max_pixels)
        image.load()
    return to_rgb(image), orientation_of(image)


def _decode_jpeg(
    data: bytes, header: Header, frame: JpegFrame, min_size: MinDecodedSize | None
) -> tuple[np.ndarray, int, int]:
    """Return the stored pixels as H x W x 3, their orientation and the factor by which they are reduced."""
    orientation = orientation_of_metadata(data[body] for body in frame.app1_segments)
    if not frame.is_plain:
        return decode_jpeg(data, header, frame), orientation, 1
    is_suspicious = False
    if has_several_scans(data, frame):
        is_suspicious = not scans_are_complete(data, frame)
    else:
        require_end_marker(data, frame)
    factor = 1
    if min_size is not None:
        upright = _upright_size(header, orientation)
        # Rotation would move a last row that is partly outside the image to the front, so the factor must divide.
        factor = reduction_factor(upright, min_size(*upright), exact=orientation in _ROTATIONS)
    pixels = decode_jpeg(data, header, frame, factor)
    # Missing blocks are decoded to 128, at every scale.
    if is_suspicious or bool((pixels[-1, -1] == 128).all()):
        with _full_scale_check_lock:
            full_scale = pixels if factor == 1 else decode_jpeg(data, header, frame)
            _require_complete(data, header, frame, full_scale)
    return pixels, orientation, factor


def _require_complete(data: bytes, header: Header, frame: JpegFrame, pixels: np.ndarray) -> None:
    """Reject a JPEG whose coded data ends before its image is complete; `pixels` is the full-scale image.

    Bytes appended to the coded data do not change a complete image, because the decoder stops before them. In an
    incomplete image they are decoded as blocks.
    """
    end, has_end_marker = end_of_coded_data(data, frame)
    extended = data[:end] + bytes(range(1, 200)) * 3 + data[end:]
    if np.array_equal(decode_jpeg(extended, header, frame), pixels):
        return
    if has_end_marker:
        raise DecodeError(Reason.TRUNCATED, "the JPEG data ends before the image is complete")
    raise DecodeError(Reason.CORRUPT, "the JPEG data is interrupted by a stray marker")


# EXIF orientation -> whether rows and columns are swapped, and which axes are flipped afterwards.
_ROTATIONS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


def _stored_size(hwc: np.ndarray, header: Header) -> tuple[int, int]:
    """Width and height as stored. The decoder may have cropped a HEIC, so its size is taken from the pixels."""
    if header.format != Format.HEIC:
        return header.width, header.height
    height, width = hwc.shape[:2]
    return (height, width) if header.is_rotated_by_decoder else (width, height)


def _upright_size(header: Header, orientation: int) -> tuple[int, int]:
    swaps_axes = orientation in _ROTATIONS and _ROTATIONS[orientation][0]
    return (header.width, header.height) if swaps_axes else (header.height, header.width)


def _upright(hwc: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip H x W x 3 pixels by an EXIF orientation; 1 and unknown values do nothing."""
    if orientation not in _ROTATIONS:
        return hwc
    swaps_axes, flipped_axes = _ROTATIONS[orientation]
    rotated = hwc.swapaxes(0, 1) if swaps_axes else hwc
    return np.ascontiguousarray(np.flip(rotated, flipped_axes))


# Substrings of the messages with which numpy and the C libraries report failed allocations.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "insufficient memory",
    "out of memory",
    "memory allocation failure",
)
_UNSUPPORTED = ("unsupported", "not implemented", "unknown pixel mode", "cannot handle")
_TRUNCATED = ("truncated", "incomplete", "not enough image data", "unexpected end")


def _translated(error: Exception, header: Header) -> DecodeError:
    """Translate an exception of a decoder; its message may quote the file and is therefore dropped."""
    text = str(error).lower()
    if any(words in text for words in _OUT_OF_MEMORY):
        raise MemoryError(f"out of memory on {header.width} x {header.height} pixels") from error
    if any(words in text for words in _TRUNCATED):
        return DecodeError(Reason.TRUNCATED, f"the {header.format} data ends before the image is complete")
    if any(words in text for words in _UNSUPPORTED):
        return DecodeError(
            Reason.UNSUPPORTED_FORMAT, f"this variant of {header.format} is not supported by its decoder"
        )
    return DecodeError(Reason.CORRUPT, f"the {header.format} decoder failed ({type(error).__name__})")
