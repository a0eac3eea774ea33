"""Computes the fingerprint of a prepared image: a digest of its pixels, and two thumbnails.

Equal digests mean equal pixels, which also finds copies with other metadata or in another lossless format. Thumbnails
are compared to find copies that were compressed, resized, brightened, flipped or cropped. One shows the whole image,
the other one its center, because the center of an image equals the whole of its cropped copy.
"""

import hashlib

import numpy as np
import numpy.typing as npt
from PIL import Image

THUMBNAIL_SIDE = 12
"""Height and width of a thumbnail in pixels."""

VIEWS = (1.0, 0.95)
"""Side of the part of the image that each of the thumbnails shows, as a fraction of the image."""

FINGERPRINT = np.dtype(
    [("digest", "<u8"), ("thumbnails", "u1", (len(VIEWS), THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3))]
)
"""Data type of a fingerprint, 872 bytes; it can be stored in a .npy file."""

Fingerprints = npt.NDArray[np.void]
"""Array of shape (N,) with the data type `FINGERPRINT`."""

_DIGEST_BYTES = (
    8  # among ten million images, two different ones have the same digest with a probability of 3e-6
)


def fingerprint_images(images: npt.NDArray[np.uint8], size: tuple[int, int] | None = None) -> Fingerprints:
    """Return the fingerprints of N images.

    Args:
        images: uint8 array of shape (N, H, W, 3).
        size: height and width of the center crop that is compared, at most H and W; None: the whole image.
            Training images are prepared without the center crop of `classify`, and validation images with it.
    """
    height, width = size or images.shape[1:3]
    top, left = round((images.shape[1] - height) / 2), round((images.shape[2] - width) / 2)
    cropped = images[:, top : top + height, left : left + width]
    found = np.empty(len(images), FINGERPRINT)
    for position, image in enumerate(cropped):
        pixels = np.ascontiguousarray(image)
        digest = hashlib.blake2b(pixels.data, digest_size=_DIGEST_BYTES).digest()
        found["digest"][position] = int.from_bytes(digest, "little")
        found["thumbnails"][position] = _thumbnails(Image.fromarray(pixels))
    return found


def _thumbnails(image: Image.Image) -> npt.NDArray[np.uint8]:
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    resized = []
    for fraction in VIEWS:
        left, top = (side * (1 - fraction) / 2 for side in image.size)
        box = (left, top, image.width - left, image.height - top)
        resized.append(np.asarray(image.resize(size, Image.Resampling.BOX, box)))
    return np.stack(resized)
