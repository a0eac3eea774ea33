"""Convert Pillow images of any mode to RGB, and read their orientation."""

import io
import struct
from collections.abc import Iterable

import numpy as np
from PIL import AvifImagePlugin, ExifTags, Image, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from batchcls.images.formats import DecodeError, Format, Header
from batchcls.schema import Reason

_PLUGINS: dict[Format, type[ImageFile.ImageFile]] = {
    Format.PNG: PngImageFile,
    Format.WEBP: WebPImageFile,
    Format.GIF: GifImageFile,
    Format.BMP: BmpImageFile,
    Format.TIFF: TiffImageFile,
    Format.AVIF: AvifImageFile,
}
_BITS_PER_SAMPLE = 258
_EXIF_START, _XMP_START = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# 32-bit samples have no defined range that could be scaled to 0..255.
_MODES_WITHOUT_RANGE = frozenset({"I", "F"})
# Exceptions of Pillow for damaged EXIF data, or for text that only resembles it.
_EXIF_ERRORS = (SyntaxError, ValueError, KeyError, TypeError, IndexError, OSError, struct.error)


def open_unloaded(data: bytes, header: Header, max_pixels: int) -> ImageFile.ImageFile:
    """Open an image with the Pillow plugin of its format, without decoding pixels.

    `Image.open` would detect the format again, import all plugins and apply its own limit of pixels. Three plugins
    apply that limit, too: it is raised to `max_pixels` if it is lower, and never lowered, so that threads do not
    affect each other.

    Raises:
        DecodeError: corrupt, if Pillow reads another size than `header`, for which the limit was checked.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    image = _plugin(header.format)(io.BytesIO(data))
    # The plugin of TIFF swaps width and height if the orientation requires it, and the plugin of HEIC always does.
    is_same = sorted(image.size) == sorted((header.width, header.height))
    if not is_same and not (header.format == Format.HEIC and _matches_crop(image.size, header)):
        raise DecodeError(Reason.CORRUPT, f"the {header.format} header contains contradicting sizes")
    return image


def _matches_crop(size: tuple[int, int], header: Header) -> bool:
    """Whether the size of an upright image equals that of the header, up to rounding of the crop."""
    width, height = reversed(size) if header.is_rotated_by_decoder else size
    return abs(width - header.width) <= 1 and abs(height - header.height) <= 1


def _plugin(kind: Format) -> type[ImageFile.ImageFile]:
    """Return the Pillow class for a format. Decoders with threads get one, as all cores are used by workers.

    Raises:
        DecodeError: unsupported_format, if the extra for HEIC is not installed.
    """
    if kind == Format.AVIF:
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    elif kind == Format.HEIC:
        try:
            import pillow_heif  # noqa: PLC0415
        except ImportError as error:
            raise DecodeError(
                Reason.UNSUPPORTED_FORMAT, "HEIC requires an extra: pip install 'batchcls[heic]'"
            ) from error
        pillow_heif.options.DECODE_THREADS = 1
        pillow_heif.options.DEPTH_IMAGES = False
        plugin: type[ImageFile.ImageFile] = pillow_heif.HeifImageFile
        return plugin
    return _PLUGINS[kind]


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation (1 to 8) of a loaded image; 1 if it is missing or cannot be read.

    Damaged metadata only loses the orientation, as in image viewers.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _EXIF_ERRORS:
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def orientation_of_metadata(blocks: Iterable[bytes]) -> int:
    """EXIF orientation (1 to 8) from the bodies of the APP1 segments of a JPEG, in order; 1 if there is none.

    Pillow joins EXIF data that is split into several segments, and reads XMP if EXIF contains no orientation. It does
    so here for the same result as in other formats, without reading the rest of the file.
    """
    exif, xmp = b"", b""
    for block in blocks:
        if block.startswith(_EXIF_START):
            exif += block[len(_EXIF_START) :] if exif else block
        elif block.startswith(_XMP_START):
            xmp = block[len(_XMP_START) :]
    if not exif and not xmp:
        return 1
    image = Image.new("L", (1, 1))
    image.info = {name: block for name, block in (("exif", exif), ("xmp", xmp)) if block}
    return orientation_of(image)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Convert a loaded image to writable uint8 H x W x 3, with transparency on white.

    Raises:
        DecodeError: unsupported_format, for samples without a defined range (32-bit, signed, float).
    """
    if image.mode in _MODES_WITHOUT_RANGE:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"samples of mode {image.mode} have no defined range")
    if image.mode.startswith("I;16"):
        return _from_16_bit_gray(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _from_16_bit_gray(image: Image.Image) -> np.ndarray:
    """Keep the upper 8 bits, as Pillow does for 16-bit color; for gray, Pillow would clip instead."""
    samples = np.asarray(image)
    # Pillow does not scale 12-bit samples of TIFF, so the image would be almost black.
    is_12_bit = isinstance(image, TiffImageFile) and image.tag_v2.get(_BITS_PER_SAMPLE) == (12,)
    gray = (samples >> (4 if is_12_bit else 8)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[samples == transparent] = 255
    return np.repeat(gray[:, :, np.newaxis], 3, axis=2)
