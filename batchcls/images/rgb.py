"""A Pillow image of any mode to RGB, with the orientation that belongs to it."""

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
# 32-bit samples have no agreed range to bring down to 0..255.
_WITHOUT_RANGE = frozenset({"I", "F"})
# What Pillow raises on an EXIF block that is damaged or a text that only claims to be one.
_EXIF_ERRORS = (SyntaxError, ValueError, KeyError, TypeError, IndexError, OSError, struct.error)


def open_unloaded(data: bytes, header: Header, max_pixels: int) -> ImageFile.ImageFile:
    """Open with the plugin of the format that the content has, pixels not yet decoded.

    Going to the plugin leaves out `Image.open`, which guesses the format again, imports every
    plugin there is and has a pixel limit of its own. Three plugins ask for that limit too: it is
    raised to `max_pixels` where it is lower, and never lowered, so threads do not disturb each other.

    Raises:
        DecodeError: corrupt, where Pillow reads another size than `header` does: the limit was
            held against the header, so the two must agree before anything is allocated.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    image = _plugin(header.format)(io.BytesIO(data))
    # A TIFF's plugin exchanges the sides at once where the orientation asks for it; a HEIC's does so always.
    same = sorted(image.size) == sorted((header.width, header.height))
    if not same and not (header.format == Format.HEIC and _fits(image.size, header)):
        raise DecodeError(Reason.CORRUPT, f"the {header.format} header contradicts itself about the size")
    return image


def _fits(size: tuple[int, int], header: Header) -> bool:
    """Whether an upright image has the sides of the header, up to a rounding of its crop."""
    width, height = reversed(size) if header.is_rotated_by_decoder else size
    return abs(width - header.width) <= 1 and abs(height - header.height) <= 1


def _plugin(kind: Format) -> type[ImageFile.ImageFile]:
    """The class that opens a format. Decoders with threads of their own get one: the workers have the cores.

    Raises:
        DecodeError: unsupported_format for HEIC without the extra that decodes it.
    """
    if kind == Format.AVIF:
        AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    elif kind == Format.HEIC:
        try:
            import pillow_heif  # noqa: PLC0415
        except ImportError as error:
            raise DecodeError(
                Reason.UNSUPPORTED_FORMAT, "HEIC needs an extra: pip install 'batchcls[heic]'"
            ) from error
        pillow_heif.options.DECODE_THREADS = 1
        pillow_heif.options.DEPTH_IMAGES = False
        plugin: type[ImageFile.ImageFile] = pillow_heif.HeifImageFile
        return plugin
    return _PLUGINS[kind]


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of a loaded image; 1 where there is none or it cannot be read.

    Damaged metadata costs an image nothing but its orientation, as in every viewer.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _EXIF_ERRORS:
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def orientation_of_metadata(blocks: Iterable[bytes]) -> int:
    """EXIF orientation 1 to 8 from the bodies of a JPEG's APP1 segments, in order; 1 where there is none.

    Pillow puts EXIF that is split over segments together and reads XMP where EXIF names none; it does
    so here, for the same answer as in every other format, without reading the rest of the file.
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
    """Pixels of a loaded image as writable uint8 H x W x 3, transparency on white.

    Raises:
        DecodeError: unsupported_format for samples without a range (32-bit, signed, float).
    """
    if image.mode in _WITHOUT_RANGE:
        raise DecodeError(Reason.UNSUPPORTED_FORMAT, f"samples of mode {image.mode} have no range to scale")
    if image.mode.startswith("I;16"):
        return _from_16_bit_gray(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _from_16_bit_gray(image: Image.Image) -> np.ndarray:
    """The upper 8 bits, as Pillow does for 16-bit color; its own conversion of gray clips instead."""
    samples = np.asarray(image)
    # Pillow leaves the 12 bits of a TIFF where they are, and so the image all but black.
    is_12_bit = isinstance(image, TiffImageFile) and image.tag_v2.get(_BITS_PER_SAMPLE) == (12,)
    gray = (samples >> (4 if is_12_bit else 8)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[samples == transparent] = 255
    return np.repeat(gray[:, :, np.newaxis], 3, axis=2)
