"""Images that crash or hang their decoder are found in separate processes."""

import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from batchcls.images.fetch import FetchPolicy
from batchcls.images.isolated_decode import ImageRow, find_crashing_rows
from batchcls.images.load_config import DecodeLimits, LoadSettings
from batchcls.preprocessing import Preprocessing, Views
from batchcls.schema import Reason
from tests.conftest import REPOSITORY
from tests.crashing_decoder.sitecustomize import CRASH, EXHAUST_MEMORY, HANG
from tests.helpers.bombs import bmp_runs, png_chunk
from tests.helpers.drawing import draw, encode


@pytest.fixture
def settings() -> LoadSettings:
    return LoadSettings(
        run_id="r",
        base="",
        kept=(),
        fetch=FetchPolicy(),
        limits=DecodeLimits(1_000_000, 8, seconds=0.2),
        preprocessing=Preprocessing(
            input_height=64,
            input_width=64,
            resize_height=70,
            resize_width=70,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            interpolation="bilinear",
        ),
        views=Views(),
        normalize="engine",
        fetch_threads=1,
        decode_threads=1,
        block_rows=8,
    )


@pytest.mark.parametrize(
    ("mark", "word", "reason"),
    [
        (CRASH, "SIGSEGV", Reason.DECODER_CRASH),
        (HANG, "does not return", Reason.DECODE_TIMEOUT),
        pytest.param(EXHAUST_MEMORY, "memory", Reason.DECODER_CRASH, marks=pytest.mark.long),
    ],
)
def test_only_rows_that_crash_a_process_are_found(
    settings: LoadSettings, monkeypatch: pytest.MonkeyPatch, mark: bytes, word: str, reason: Reason
):
    monkeypatch.setattr(
        sys, "path", [str(REPOSITORY / "tests" / "crashing_decoder"), str(REPOSITORY), *sys.path]
    )
    if mark == EXHAUST_MEMORY:  # Memory must be exhausted before the time limit.
        settings = replace(settings, limits=replace(settings.limits, seconds=60))
    image = encode(draw(0, 90, 70), "JPEG")
    images = [image, image[:50], b"", image + mark, image]
    rows = [ImageRow(10 + index, None, image) for index, image in enumerate(images)]
    found = find_crashing_rows(settings, rows)
    assert list(found) == [13]
    assert found[13].reason == reason
    assert word in found[13].detail


def test_files_are_fetched_and_failed_rows_are_not_crashing_rows(settings: LoadSettings, tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(encode(draw(0, 90, 70), "JPEG"))
    rows = [ImageRow(0, str(tmp_path / "a.jpg"), None), ImageRow(1, str(tmp_path / "gone.jpg"), None)]
    assert find_crashing_rows(settings, rows) == {}


def test_image_over_its_time_limit_is_not_a_crashing_row(settings: LoadSettings):
    slow = ImageRow(0, None, bmp_runs(999, 8))
    assert find_crashing_rows(replace(settings, limits=replace(settings.limits, seconds=0.01)), [slow]) == {}


@pytest.mark.long
def test_largest_permitted_image_has_enough_memory(settings: LoadSettings):
    """Regression test: 16 bits with alpha need 24 bytes per pixel, but 12 were allowed, so it was a decoder_crash."""
    limits = DecodeLimits()
    height = limits.max_pixels // 9000
    header = struct.pack(">IIBBBBB", 9000, height, 16, 6, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + 9000 * 8)), 1)
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    image = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)
    assert find_crashing_rows(replace(settings, limits=limits), [ImageRow(0, None, image)]) == {}
