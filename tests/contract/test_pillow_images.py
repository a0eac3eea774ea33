"""Pillow's own test images have the pixels of Pillow in all supported formats.

The images are not part of this repository. Set BATCHCLS_PILLOW_IMAGES to the folder Tests/images of a Pillow checkout;
docs/reference/image-formats.md lists the results by format.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from batchcls.images.decode import DecodeError, DecodeLimits, decode
from batchcls.images.formats import Format
from batchcls.schema import Reason
from tests.conftest import REPOSITORY
from tests.helpers.pillow_reference import pillow_pixels

LIMITS = DecodeLimits(min_side_pixels=1)
READ = {"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"}
# Images that Pillow decodes but batchcls rejects, for the reasons in docs/reference/image-formats.md.
REJECTED = {
    "10ct_32bit_128.tiff": Reason.UNSUPPORTED_FORMAT,
    "16_bit_binary_pgm.tiff": Reason.UNSUPPORTED_FORMAT,
    "16bit.s.tif": Reason.UNSUPPORTED_FORMAT,
    "crash-74d2a78403a5a59db1fb0a2b8735ac068a75f6e3.tif": Reason.CORRUPT,
    "tiff_wrong_bits_per_sample.tiff": Reason.TRUNCATED,
}
# Images that Pillow rejects because of their metadata but browsers show.
BEYOND_PILLOW = {"chunk_no_fctl.png", "png_decompression_dos.png", "unknown_compression_method.png"}
TWELVE_BITS = {"12bit.cropped.tif"}


def reference(path: Path) -> tuple[str | None, np.ndarray | None]:
    """Pillow's name of the format, and the pixels; None if Pillow rejects the image."""
    name = None
    try:
        image = Image.open(path)
        name = image.format
        if image.mode.startswith("I;16"):
            # Pillow clips 16-bit gray to 255, but keeps the upper 8 bits of 16-bit color, as batchcls always does.
            gray = np.asarray(image) >> (4 if path.name in TWELVE_BITS else 8)
            gray[np.asarray(image) == image.info.get("transparency", -1)] = 255
            return name, np.repeat(gray[:, :, np.newaxis], 3, axis=2)
        return name, pillow_pixels(path.read_bytes())
    except Exception:  # noqa: BLE001 - whatever its parsers raise on files made to crash them
        return name, None


def pixels_or_reason(data: bytes) -> np.ndarray | Reason:
    try:
        return decode(data, LIMITS).pixels
    except DecodeError as error:
        return error.failure.reason


@pytest.fixture(scope="module")
def folder() -> Path:
    named = os.environ.get("BATCHCLS_PILLOW_IMAGES")
    if not named:
        pytest.skip("BATCHCLS_PILLOW_IMAGES does not name the folder Tests/images of Pillow's repository")
    pillow_heif.register_heif_opener()
    return Path(named)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_all_images_of_supported_formats_equal_pillow(folder: Path):
    outcomes: Counter[str] = Counter()
    wrong = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, theirs = reference(path)
        ours = pixels_or_reason(path.read_bytes())
        if theirs is None:
            right = isinstance(ours, Reason) or path.name in BEYOND_PILLOW
            outcome = "rejected by both" if isinstance(ours, Reason) else "only here"
        elif name not in READ:
            right = ours in (Reason.NOT_AN_IMAGE, Reason.UNSUPPORTED_FORMAT)
            outcome = "of a format that is not read"
        elif isinstance(ours, Reason):
            right, outcome = REJECTED.get(path.name) == ours, "rejected here"
        else:
            right, outcome = np.array_equal(ours, theirs), f"same, {name}"
        outcomes[outcome] += 1
        if not right:
            wrong.append(
                f"{path.relative_to(folder)}: {name}, {ours if isinstance(ours, Reason) else 'pixels'}"
            )
    print(f"\n{dict(sorted(outcomes.items()))}")
    assert not wrong, "\n".join(wrong)
    assert sum(count for outcome, count in outcomes.items() if outcome.startswith("same")) >= 600


def test_documentation_lists_rejected_files():
    text = (REPOSITORY / "docs" / "reference" / "image-formats.md").read_text(encoding="utf-8")
    assert [name for name in [*REJECTED, *BEYOND_PILLOW] if f"`{name}`" not in text] == []
    assert [kind for kind in Format if f"`{kind}`" not in text] == []
