"""Bytes of an image file to RGB pixels, or a reason why not.

Two ways lead to the pixels. Plain JPEG (8 bits, grey or three components, sequential or
progressive) goes straight from the bytes through torchvision's libjpeg-turbo; everything else
goes through Pillow (`batchcls.images.rgb`). Both release the GIL, and neither has state here: `decode`
may be called from many threads at once. Callers with several threads set
`torch.set_num_threads(1)`, so that torch does not add its own to theirs.

What a decoder would pass over in silence and is refused here: JPEG data that ends early behind an
end marker (libjpeg paints the rest grey), progressive JPEG with scans missing, PNG data that
belies its checksum, files shorter than their own header says.

What cannot be told at low cost, and passes: a flipped bit in JPEG, WebP, GIF, BMP or TIFF data
that still decodes (these formats carry no checksum; about nine in ten single flips in a JPEG
resynchronise without a trace even in libjpeg's own warnings); data missing from the last block
of a sequential JPEG, from the last refinement scan of a progressive one, or, behind a forged end
marker, from a CMYK one.
"""

import io
from dataclasses import dataclass

import torch
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.io import ImageReadMode, decode_jpeg

from batchcls.errors import InputError
from batchcls.images.formats import DecodeError, Header, JpegFrame
from batchcls.images.header import read_header
from batchcls.images.jpeg import end_of_coded_data, has_several_scans, scans_are_complete
from batchcls.images.rgb import open_unloaded, orientation_of, to_rgb
from batchcls.schema import Reason

__all__ = ["DecodeError", "DecodeLimits", "Decoded", "decode"]


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What is refused before a pixel is allocated.

    `max_pixels`, at least 1: the default is a quarter of a GiB of RGB, above the 50 and 61
    megapixels of today's cameras and equal to where Pillow begins to warn. A worker needs about
    3 bytes a pixel and thread, 9 for progressive JPEG. A higher one raises Pillow's own limit
    with it. `min_side_pixels`, at least 1: shorter sides are tracking pixels and rules, not pictures.
    """

    max_pixels: int = 89_478_485
    min_side_pixels: int = 8

    def __post_init__(self) -> None:
        for name in ("max_pixels", "min_side_pixels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Decoded:
    """A picture as it is to be seen.

    `pixels` is uint8 3 x H x W, RGB, turned upright, its memory laid out H x W x 3, which the
    resize reads fastest. `width` and `height` are those of the stored picture, before it was turned.
    """

    pixels: torch.Tensor
    width: int
    height: int


def decode(data: bytes, limits: DecodeLimits) -> Decoded:
    """Decode the first picture of a file.

    Transparency is composed on white, 16 bits keep their upper 8, animations give their first frame.

    Raises:
        DecodeError: empty, not_an_image, unsupported_format, truncated, corrupt, too_many_pixels
            or too_small; its detail holds nothing of the file.
        MemoryError: the process is out of memory, which says nothing about the file.
    """
    header = read_header(data)
    _require_size(header, limits)
    try:
        plain = header.jpeg is not None and header.jpeg.is_plain
        hwc, orientation = _decode_jpeg(data, header) if plain else _decode_with_pillow(data, header, limits)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # the decoders' edge: damage makes them raise whatever it does
        raise _translated(error, header) from error
    return Decoded(_upright(hwc, orientation).permute(2, 0, 1), header.width, header.height)


def _require_size(header: Header, limits: DecodeLimits) -> None:
    size = f"{header.width} x {header.height} pixels"
    if header.allocated_pixels > limits.max_pixels:
        raise DecodeError(
            Reason.TOO_MANY_PIXELS, f"{size} need {header.allocated_pixels}, more than {limits.max_pixels}"
        )
    if min(header.width, header.height) < limits.min_side_pixels:
        raise DecodeError(Reason.TOO_SMALL, f"{size}, a side below {limits.min_side_pixels}")


def _decode_with_pillow(data: bytes, header: Header, limits: DecodeLimits) -> tuple[torch.Tensor, int]:
    image = open_unloaded(data, header, limits.max_pixels)
    image.load()
    return torch.from_numpy(to_rgb(image)), orientation_of(image)


def _decode_jpeg(data: bytes, header: Header) -> tuple[torch.Tensor, int]:
    """H x W x 3 as stored, and the orientation.

    The orientation is read by Pillow, for the same answer in every format: torchvision takes the
    first APP1 segment for EXIF, which it is not where XMP comes first.
    """
    frame = header.jpeg
    assert frame is not None, "the caller has a JPEG"
    suspicious = has_several_scans(data, frame) and not scans_are_complete(data, frame)
    pixels = _jpeg_pixels(data)
    # 128 is what a block that never came decodes to.
    if suspicious or bool((pixels[:, -1, -1] == 128).all()):
        _require_complete(data, frame, pixels)
    orientation = orientation_of(JpegImageFile(io.BytesIO(data))) if frame.has_application_1 else 1
    return pixels.permute(1, 2, 0), orientation


def _jpeg_pixels(data: bytes) -> torch.Tensor:
    # The copy is a hundredth of the decode; torch warns about a buffer that it could write to and must not.
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels: torch.Tensor = decode_jpeg(encoded, mode=ImageReadMode.RGB)
    return pixels


def _require_complete(data: bytes, frame: JpegFrame, pixels: torch.Tensor) -> None:
    """Refuse a JPEG whose coded data was used up before its picture was whole.

    Bytes put in behind the data change nothing in a whole picture, for the decoder stops before
    them; in one that was cut they become blocks.
    """
    end, has_end_marker = end_of_coded_data(data, frame)
    lengthened = data[:end] + bytes(range(1, 200)) * 3 + data[end:]
    if torch.equal(_jpeg_pixels(lengthened), pixels):
        return
    if has_end_marker:
        raise DecodeError(Reason.TRUNCATED, "the JPEG's data ends before its picture is whole")
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


def _upright(hwc: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn H x W x 3 pixels by an EXIF orientation; 1 and unknown ones stay as they are."""
    if orientation not in _TURNS:
        return hwc
    exchanged, reversed_axes = _TURNS[orientation]
    turned = hwc.transpose(0, 1) if exchanged else hwc
    return turned.flip(reversed_axes).contiguous()


# torch and the C libraries report an allocation that failed as errors of their own.
_OUT_OF_MEMORY = ("can't allocate memory", "insufficient memory", "out of memory")
_CUT_SHORT = ("truncated", "incomplete", "not enough image data", "unexpected end")


def _translated(error: Exception, header: Header) -> DecodeError:
    """The failure that a decoder's exception means; its text may quote the file and is not passed on."""
    text = str(error).lower()
    if any(words in text for words in _OUT_OF_MEMORY):
        raise MemoryError(f"out of memory on {header.width} x {header.height} pixels") from error
    if any(words in text for words in _CUT_SHORT):
        return DecodeError(Reason.TRUNCATED, f"the {header.format} data ends before its picture is whole")
    return DecodeError(Reason.CORRUPT, f"the {header.format} decoder stopped ({type(error).__name__})")
