"""Reference for decode tests: Pillow's own functions, and the tolerance for JPEG."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from batchcls.images.decode import DecodeError, decode
from batchcls.images.load_config import DecodeLimits
from batchcls.schema import Reason
from tests.helpers.drawing import samples

LIMITS = DecodeLimits()
# Maximum and mean difference of JPEG pixels from Pillow's, in levels of 255. Both use libjpeg-turbo with the same
# defaults, and the measured difference is 0. Other builds may round colors differently.
JPEG_LARGEST, JPEG_MEAN = 2, 0.1
PLAIN_JPEG = [
    name for name in samples() if name.startswith("jpeg") and "cmyk" not in name and "ycck" not in name
]
THROUGH_PILLOW = [name for name in samples() if name not in PLAIN_JPEG]


def pixels_of(data: bytes) -> np.ndarray:
    """Pixels as decoded by batchcls, int H x W x 3."""
    return decode(data, LIMITS).pixels.astype(int)


def pillow_pixels(data: bytes) -> np.ndarray:
    """Pixels as decoded by Pillow, upright and composited on white, int H x W x 3."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB")).astype(int)


def reason_of(data: bytes, limits: DecodeLimits = LIMITS) -> Reason:
    with pytest.raises(DecodeError) as raised:
        decode(data, limits)
    assert raised.value.failure.detail
    return raised.value.failure.reason


def assert_within_jpeg_bound(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= JPEG_LARGEST
    assert np.abs(ours - theirs).mean() <= JPEG_MEAN
