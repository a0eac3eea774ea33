"""JPEGs are decoded at a reduced scale only if that is large enough, with equal geometry and equal checks."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchcls.images import decode as decode_module
from batchcls.images.decode import Decoded, DecodeError, decode, reduction_factor
from batchcls.images.transform import Transform
from batchcls.preprocessing import Preprocessing
from batchcls.schema import Reason
from tests.helpers.drawing import bombs, draw, encode, samples, truncate_before_end_marker
from tests.helpers.pillow_reference import LIMITS, reason_of

MARGIN = 4.0

# Mean difference, in levels of 255, between network inputs from the scaled and from the full-scale image.
MEAN_LEVELS = 1.0


def reduced(data: bytes, height: int = 20, width: int = 20) -> Decoded:
    return decode(data, LIMITS, lambda *_: (MARGIN * height, MARGIN * width))


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_factor_is_the_largest_that_keeps_the_minimum_size(factor):
    enough, least = 30 * factor, (30.0, 30.0)
    assert reduction_factor((enough, enough), least) == factor
    assert reduction_factor((enough - 1, enough), least) == factor // 2
    assert reduction_factor((enough, enough - 1), least) == factor // 2
    assert reduction_factor((enough, 100 * enough), least) == factor


def test_image_is_never_scaled_below_the_minimum_size():
    for size in range(8, 400, 7):
        decoded = reduced(encode(draw(1, size, size + 50), "JPEG"))
        assert min(decoded.pixels.shape[:2]) >= min(20, size)
        assert (decoded.width, decoded.height) == (size, size + 50)


@pytest.mark.parametrize("width_height", [(300, 400), (301, 403), (1601, 1207)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_the_extent_is_the_stored_size_over_the_factor(width_height, options):
    width, height = width_height
    decoded = reduced(encode(draw(2, width, height), "JPEG", **options))
    factor = round(height / decoded.extent[0])
    assert factor > 1
    assert decoded.extent == (height / factor, width / factor)
    assert decoded.pixels.shape == (-(-height // factor), -(-width // factor), 3)
    assert decoded.pixels.flags.c_contiguous


def test_other_formats_and_unlimited_sizes_are_decoded_at_full_scale():
    image = draw(2, 640, 480)
    for kind in ("PNG", "WEBP"):
        assert reduced(encode(image, kind)).pixels.shape == (480, 640, 3)
    assert decode(encode(image, "JPEG"), LIMITS).pixels.shape == (480, 640, 3)
    assert reduced(encode(image.convert("CMYK"), "JPEG")).pixels.shape == (480, 640, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("width_height", [(640, 480), (643, 485)])
def test_rotated_scaled_image_matches_the_full_scale_image(width_height, orientation):
    width, height = width_height
    data = encode(draw(2, width, height), "JPEG", orientation=orientation, quality=95)
    transform = Transform(square(48))
    decoded = decode(data, LIMITS, transform.min_decoded_size(MARGIN))
    # If the size is not divisible, rotation would move the incomplete row to the front, so full scale is used.
    is_reduced = width_height == (640, 480) or orientation == 1
    assert (decoded.extent[0] in (width, height)) != is_reduced
    ours = transform(decoded.pixels, decoded.extent).astype(int)
    assert np.abs(ours - transform(decode(data, LIMITS).pixels)).mean() <= MEAN_LEVELS


def test_minimum_size_is_computed_for_the_upright_image():
    sizes = []

    def least(height: int, width: int) -> tuple[float, float]:
        sizes.append((height, width))
        return height, width

    decode(encode(draw(2, 640, 480), "JPEG", orientation=6), LIMITS, least)
    assert sizes == [(640, 480)]


@pytest.mark.parametrize("fraction", [0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_cut_jpeg_is_rejected_at_a_reduced_scale(mode, options, fraction):
    data = encode(draw(9, 300, 200).convert(mode), "JPEG", **options)
    for damaged in (truncate_before_end_marker(data, fraction), data[: int(len(data) * fraction)]):
        with pytest.raises(DecodeError) as raised:
            reduced(damaged)
        assert raised.value.failure.reason == Reason.TRUNCATED == reason_of(damaged)


def test_scaled_jpeg_with_a_gray_end_is_not_truncated():
    image = draw(9, 300, 200)
    image.paste((128, 128, 128), (0, 100, 300, 200))
    assert reduced(encode(image, "JPEG", quality=90)).pixels[-1, -1].tolist() == [128, 128, 128]


def test_bombs_are_rejected_before_the_scale_is_chosen():
    with pytest.raises(DecodeError) as raised:
        reduced(bombs()["jpeg"])
    assert raised.value.failure.reason == Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("luma", [0x14, 0x24, 0x42, 0x12])
@pytest.mark.parametrize("chroma", [0x11, 0x12, 0x21])
def test_unusual_samplings_equal_pillow_or_are_rejected(luma, chroma):
    """Patched sampling factors: the data then represents another image, which both libraries must decode equally."""
    data = bytearray(samples()["jpeg"])
    frame = data.index(b"\xff\xc0")
    data[frame + 11], data[frame + 14], data[frame + 17] = luma, chroma, chroma
    try:
        theirs = np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))
    except OSError:
        assert reason_of(bytes(data)) == Reason.CORRUPT
    else:
        # The data may be too short for the other image, which Pillow accepts.
        assert np.array_equal(pixels_or_reason(bytes(data)), theirs) or (
            pixels_or_reason(bytes(data)) == Reason.TRUNCATED
        )


def pixels_or_reason(data: bytes) -> np.ndarray | Reason:
    try:
        return decode(data, LIMITS).pixels
    except DecodeError as error:
        return error.failure.reason


def test_real_photographs_are_similar_at_a_reduced_scale(shared: Path):
    transform = Transform(square(40))
    photographs = sorted((shared / "data" / "imagenet").glob("*.JPEG"))[::6]
    distances, factors = [], set()
    for path in photographs:
        data = path.read_bytes()
        decoded = decode(data, LIMITS, transform.min_decoded_size(MARGIN))
        factors.add(round(decoded.height / decoded.extent[0]))
        ours = transform(decoded.pixels, decoded.extent).astype(int)
        distances.append(np.abs(ours - transform(decode(data, LIMITS).pixels)).mean())
    assert 2 in factors
    assert np.mean(distances) <= MEAN_LEVELS


def test_full_scale_is_decoded_only_if_the_end_is_suspicious(monkeypatch: pytest.MonkeyPatch):
    factors = []
    original = decode_module.decode_jpeg

    def counting(data, header, frame, factor=1):
        factors.append(factor)
        return original(data, header, frame, factor)

    monkeypatch.setattr(decode_module, "decode_jpeg", counting)
    reduced(encode(draw(9, 640, 480), "JPEG"))
    assert len(factors) == 1
    assert factors[0] > 1


def square(side: int) -> Preprocessing:
    return Preprocessing(
        input_height=side, input_width=side, resize_height=side, resize_width=side,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bilinear",
    )  # fmt: skip
