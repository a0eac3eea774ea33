"""Bytes of an image file to RGB pixels, or a reason why not.

Two ways lead to the pixels. JPEG goes through libjpeg-turbo (`batchcls.images.decode`), plain
JPEG at a reduced scale where the image is far larger than it is needed; everything else goes
through Pillow (`batchcls.images.rgb`). Both release the GIL, except Pillow for AVIF, and neither has
state here: `decode` may be called from many threads at once.

What a decoder would pass over in silence and is refused here: JPEG data that ends early behind an
end marker (libjpeg paints the rest gray), progressive JPEG with scans missing, PNG data that
belies its checksum, AVIF and HEIC data filled up with zeros, files shorter than their own header says.

What cannot be told at low cost, and passes: a flipped bit in data of any format but PNG that still
decodes (the others carry no checksum; about nine in ten single flips in a JPEG resynchronize without
a trace even in libjpeg's own warnings); data missing from the last block of a sequential JPEG, from
the last refinement scan of a progressive one, or, behind a forged end marker, from a CMYK one.
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
_through_pillow = threading.Lock()


def reduction_factor(size: tuple[int, int], least: tuple[float, float], whole: bool = False) -> int:
    """1, 2, 4 or 8: by how much an image may be smaller than `size` and still be as large as `least`.

    Both are height and width. `whole` asks for a factor that divides them without a rest.
    """
    for factor in _FACTORS:
        large_enough = all(side >= factor * enough for side, enough in zip(size, least, strict=True))
        if large_enough and not (whole and any(side % factor for side in size)):
            return factor
    return 1


def decode_jpeg(data: bytes, header: Header, frame: JpegFrame, factor: int = 1) -> np.ndarray:
    """uint8 H x W x 3, C-contiguous, RGB as stored; with a factor of 2, 4 or 8 smaller by it.

    What libjpeg warns about and passes over is passed over here. Data that is missing is painted gray, without a word.

    Raises:
        Exception: what the decoder raises on damage that it cannot pass over.
    """
    if not frame.is_plain:
        return _jpeg_with_pillow(data, header, frame, factor)
    # Of all the scales simplejpeg takes the smallest that still has this size: the one that was meant.
    least = {"min_height": -(-header.height // factor), "min_width": -(-header.width // factor)}
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, strict=False, **least)
    except ValueError:
        # TurboJPEG takes what libjpeg only warns about while it reads the header for an error (stray
        # bytes between segments, parts of an ICC profile that do not fit), and has no name for some
        # samplings, such as 4:1:0. The libjpeg below it decodes them, and so does Pillow with it. That takes four
        # times the memory that was counted by the header, so no two threads do it at once.
        with _through_pillow:
            return _jpeg_with_pillow(data, header, frame, factor)
    return pixels


def _jpeg_with_pillow(data: bytes, header: Header, frame: JpegFrame, factor: int) -> np.ndarray:
    # Pillow has a parser of its own, which stops at damaged metadata that libjpeg does not even read.
    image = JpegImageFile(io.BytesIO(without_metadata(data, frame)))
    if image.size != (header.width, header.height):
        raise DecodeError(Reason.CORRUPT, "the jpeg header contradicts itself about the size")
    if factor > 1:
        image.draft("RGB", (header.width // factor, header.height // factor))
    return np.array(image.convert("RGB"))


__all__ = ["DecodeError", "DecodeLimits", "Decoded", "MinDecodedSize", "decode", "read_checked_header"]

# Three whole images at a time, which no header tells of: no two threads do that at once.
_checking_a_whole_image = threading.Lock()


@dataclass(frozen=True, slots=True)
class Decoded:
    """An image as it is to be seen.

    `pixels` is uint8 H x W x 3, RGB, turned upright, C-contiguous. `width` and `height` are those of
    the stored image, before it was turned. `extent` is the height and width of the image in units
    of `pixels`: their shape, except where the image was reduced and the last row or column lies
    partly outside of it (375 rows reduced by 2 are 187.5 high and fill 188).
    """

    pixels: np.ndarray
    width: int
    height: int
    extent: tuple[float, float]


def read_checked_header(data: bytes, limits: DecodeLimits) -> Header:
    """The header of an image that is within the limits, with no pixel decoded.

    Raises:
        DecodeError: as `decode`.
    """
    header = read_header(data)
    _require_size(header, limits)
    return header


def decode(
    data: bytes, limits: DecodeLimits, least: MinDecodedSize | None = None, header: Header | None = None
) -> Decoded:
    """Decode the first image of a file.

    Transparency is composed on white, 16 bits keep their upper 8, animations give their first frame.

    Args:
        data: the whole file.
        limits: how large and how small the stored image may be.
        least: with it a JPEG may be decoded at a reduced scale that leaves at least what it says.
            Without it every image comes at its full size.
        header: what `read_checked_header` has said of the file, where it was asked before.

    Raises:
        DecodeError: empty, not_an_image, unsupported_format, truncated, corrupt, too_many_pixels
            or too_small; its detail holds nothing of the file.
        MemoryError: the process is out of memory, which says nothing about the file.
    """
    header = header or read_checked_header(data, limits)
    try:
        if header.jpeg is not None:
            hwc, orientation, factor = _decode_jpeg(data, header, header.jpeg, least)
        else:
            hwc, orientation = _decode_with_pillow(data, header, limits)
            factor = 1
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # the decoders' edge: damage makes them raise whatever it does
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
            Reason.TOO_MANY_PIXELS, f"{size} need {header.allocated_pixels}, more than {limits.max_pixels}"
        )
    if min(header.width, header.height) < limits.min_side_pixels:
        raise DecodeError(Reason.TOO_SMALL, f"{size}, a side below {limits.min_side_pixels}")


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
    data: bytes, header: Header, frame: JpegFrame, least: MinDecodedSize | None
) -> tuple[np.ndarray, int, int]:
    """H x W x 3 as stored, the orientation, and the factor by which it is reduced."""
    orientation = orientation_of_metadata(data[body] for body in frame.app1_segments)
    if not frame.is_plain:
        return decode_jpeg(data, header, frame), orientation, 1
    suspicious = False
    if has_several_scans(data, frame):
        suspicious = not scans_are_complete(data, frame)
    else:
        require_end_marker(data, frame)
    factor = 1
    if least is not None:
        upright = _upright_size(header, orientation)
        # A turned image would have the row that lies partly outside of it in front: none may.
        factor = reduction_factor(upright, least(*upright), whole=orientation in _TURNS)
    pixels = decode_jpeg(data, header, frame, factor)
    # 128 is what a block that never came decodes to, at every scale.
    if suspicious or bool((pixels[-1, -1] == 128).all()):
        with _checking_a_whole_image:
            whole = pixels if factor == 1 else decode_jpeg(data, header, frame)
            _require_complete(data, header, frame, whole)
    return pixels, orientation, factor


def _require_complete(data: bytes, header: Header, frame: JpegFrame, pixels: np.ndarray) -> None:
    """Refuse a JPEG whose coded data was used up before its image, here at full scale, was whole.

    Bytes put in behind the data change nothing in a whole image, for the decoder stops before
    them; in one that was cut they become blocks.
    """
    end, has_end_marker = end_of_coded_data(data, frame)
    lengthened = data[:end] + bytes(range(1, 200)) * 3 + data[end:]
    if np.array_equal(decode_jpeg(lengthened, header, frame), pixels):
        return
    if has_end_marker:
        raise DecodeError(Reason.TRUNCATED, "the JPEG's data ends before its image is whole")
    raise DecodeError(Reason.CORRUPT, "the JPEG's data is broken off by a stray marker")


# Whether rows and columns are exchanged, then which of the two axes are reversed.
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


def _stored_size(hwc: np.ndarray, header: Header) -> tuple[int, int]:
    """Width and height as stored: of a HEIC those that its decoder left of it when it cropped it."""
    if header.format != Format.HEIC:
        return header.width, header.height
    height, width = hwc.shape[:2]
    return (height, width) if header.is_rotated_by_decoder else (width, height)


def _upright_size(header: Header, orientation: int) -> tuple[int, int]:
    exchanged = orientation in _TURNS and _TURNS[orientation][0]
    return (header.width, header.height) if exchanged else (header.height, header.width)


def _upright(hwc: np.ndarray, orientation: int) -> np.ndarray:
    """Turn H x W x 3 pixels by an EXIF orientation; 1 and unknown ones stay as they are."""
    if orientation not in _TURNS:
        return hwc
    exchanged, reversed_axes = _TURNS[orientation]
    turned = hwc.swapaxes(0, 1) if exchanged else hwc
    return np.ascontiguousarray(np.flip(turned, reversed_axes))


# numpy and the C libraries report an allocation that failed as errors of their own.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "insufficient memory",
    "out of memory",
    "memory allocation failure",
)
_NOT_BUILT_IN = ("unsupported", "not implemented", "unknown pixel mode", "cannot handle")
_CUT_SHORT = ("truncated", "incomplete", "not enough image data", "unexpected end")


def _translated(error: Exception, header: Header) -> DecodeError:
    """The failure that a decoder's exception means; its text may quote the file and is not passed on."""
    text = str(error).lower()
    if any(words in text for words in _OUT_OF_MEMORY):
        raise MemoryError(f"out of memory on {header.width} x {header.height} pixels") from error
    if any(words in text for words in _CUT_SHORT):
        return DecodeError(Reason.TRUNCATED, f"the {header.format} data ends before its image is whole")
    if any(words in text for words in _NOT_BUILT_IN):
        return DecodeError(
            Reason.UNSUPPORTED_FORMAT, f"{header.format} of a kind that its decoder does not know"
        )
    return DecodeError(Reason.CORRUPT, f"the {header.format} decoder stopped ({type(error).__name__})")
