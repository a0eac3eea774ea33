"""A JPEG to RGB pixels as stored, whole or at a reduced scale.

Plain JPEG (8 bits, grey or three components, sequential or progressive) goes straight from the bytes
through libjpeg-turbo; everything else, and what TurboJPEG's interface refuses, through Pillow.

libjpeg-turbo can leave out the fine half of each block's frequencies and so give a picture of a
half, a quarter or an eighth of its size for less work than the whole one. The scales between these
have no fast code and cost more than the whole picture. At full scale the pixels are Pillow's, bit for bit.

A reduced picture lacks frequencies that the resize of the whole one lets through in part, and its
coarser pixels sample the filter otherwise, so answers change where little more is left than the resize
needs. How much that is depends on the network: `inference.reduced_scale` measures it.
"""

import io
import threading

import numpy as np
import simplejpeg
from PIL.JpegImagePlugin import JpegImageFile

from batchcls.images.formats import DecodeError, Header, JpegFrame
from batchcls.images.jpeg import without_metadata
from batchcls.schema import Reason

_FACTORS = (8, 4, 2)
_through_pillow = threading.Lock()


def reduction(size: tuple[int, int], least: tuple[float, float], whole: bool = False) -> int:
    """1, 2, 4 or 8: by how much a picture may be smaller than `size` and still be as large as `least`.

    Both are height and width. `whole` asks for a factor that divides them without a rest.
    """
    for factor in _FACTORS:
        large_enough = all(side >= factor * enough for side, enough in zip(size, least, strict=True))
        if large_enough and not (whole and any(side % factor for side in size)):
            return factor
    return 1


def decode_jpeg(data: bytes, header: Header, frame: JpegFrame, factor: int = 1) -> np.ndarray:
    """uint8 H x W x 3, C-contiguous, RGB as stored; with a factor of 2, 4 or 8 smaller by it.

    What libjpeg warns about and passes over is passed over here. Data that is missing is painted grey, without a word.

    Raises:
        Exception: what the decoder raises on damage that it cannot pass over.
    """
    if not frame.is_plain:
        return _decode_with_pillow(data, header, frame, factor)
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
            return _decode_with_pillow(data, header, frame, factor)
    return pixels


def _decode_with_pillow(data: bytes, header: Header, frame: JpegFrame, factor: int) -> np.ndarray:
    # Pillow has a parser of its own, which stops at damaged metadata that libjpeg does not even read.
    image = JpegImageFile(io.BytesIO(without_metadata(data, frame)))
    if image.size != (header.width, header.height):
        raise DecodeError(Reason.CORRUPT, "the jpeg header contradicts itself about the size")
    if factor > 1:
        image.draft("RGB", (header.width // factor, header.height // factor))
    return np.array(image.convert("RGB"))
