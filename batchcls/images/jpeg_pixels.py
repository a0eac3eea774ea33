"""A plain JPEG to RGB pixels as stored, whole or at a reduced scale.

libjpeg-turbo can leave out the fine half of each block's frequencies and so give a picture of a
half, a quarter or an eighth of its size for less work than the whole one. The scales between these
have no fast code and cost more than the whole picture. At full scale the pixels are Pillow's, bit for bit.

A reduced picture lacks frequencies that the resize of the whole one lets through in part, and its
coarser pixels sample the filter otherwise, so answers change where little more is left than the resize
needs. How much that is depends on the network: `inference.reduced_scale` measures it.
"""

import io

import numpy as np
import simplejpeg
from PIL.JpegImagePlugin import JpegImageFile

from batchcls.images.formats import Header

_FACTORS = (8, 4, 2)


def reduction(size: tuple[int, int], least: tuple[float, float], whole: bool = False) -> int:
    """1, 2, 4 or 8: by how much a picture may be smaller than `size` and still be as large as `least`.

    Both are height and width. `whole` asks for a factor that divides them without a rest.
    """
    for factor in _FACTORS:
        large_enough = all(side >= factor * enough for side, enough in zip(size, least, strict=True))
        if large_enough and not (whole and any(side % factor for side in size)):
            return factor
    return 1


def decode_jpeg(data: bytes, header: Header, factor: int = 1) -> np.ndarray:
    """uint8 H x W x 3, C-contiguous, RGB as stored; with a factor of 2, 4 or 8 perhaps smaller by it.

    Data that is missing is painted grey, without a word.

    Raises:
        Exception: what the decoder raises on damage that it cannot pass over.
    """
    # Of all the scales simplejpeg takes the smallest that still has this size: the one that was meant.
    least = {"min_height": -(-header.height // factor), "min_width": -(-header.width // factor)}
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, strict=False, **least)
    except ValueError as error:
        # TurboJPEG decodes no sampling that it has no name for, such as 4:1:0; the libjpeg below it does.
        if "subsampling" not in str(error):
            raise
        return np.array(JpegImageFile(io.BytesIO(data)).convert("RGB"))
    return pixels
