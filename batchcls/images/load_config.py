"""All that loading images needs beside their rows. Needs no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from batchcls.config.common_config import FetchSettings
from batchcls.errors import InputError
from batchcls.images.fetch import FetchPolicy
from batchcls.images.url_policy import AddressPolicy
from batchcls.preprocessing import Preprocessing, Views

Least = Callable[[int, int], tuple[float, float]]
"""From the height and width of an upright image to those that it must keep at a reduced scale."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What is refused before a pixel is allocated.

    `max_pixels`, at least 1: the default is a quarter of a GiB of RGB, above the 50 and 61
    megapixels of today's cameras and equal to where Pillow begins to warn. A higher one raises
    Pillow's own limit with it. `min_side_pixels`, at least 1: shorter sides are tracking pixels
    and rules.

    `memory_bytes` is what the images that a process decodes at a time may take together, as
    `batchcls.images.decode_memory` reckons it; one that takes more is decoded alone. `seconds` is how much
    processor time one image may take.
    """

    max_pixels: int = 89_478_485
    min_side_pixels: int = 8
    memory_bytes: int = 2 << 30
    seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_pixels", "min_side_pixels", "memory_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.seconds > 0:
            raise InputError(f"seconds must be more than 0, got {self.seconds}")


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """All that a load task needs beside its rows.

    `normalize` says whether pixels leave as uint8 ("engine") or as normalized float32 ("worker").
    `decode_margin` lets a JPEG be decoded at a reduced scale that leaves it at least so many times as
    high and wide as the resize needs it; None: every image is decoded whole.
    `run_id` tells the settings of one run from those of another in a process that serves both.
    """

    run_id: str
    base: str
    kept: tuple[pa.Field, ...]
    fetch: FetchPolicy
    limits: DecodeLimits
    preprocessing: Preprocessing
    views: Views
    normalize: Literal["engine", "worker"]
    fetch_threads: int
    decode_threads: int
    block_rows: int
    decode_margin: float | None = None


def fetch_policy(settings: FetchSettings) -> FetchPolicy:
    """Which addresses are read, how long, how often and with which credentials."""
    return FetchPolicy(
        addresses=AddressPolicy(tuple(settings.allowed_root), settings.allow_private_addresses),
        timeout_seconds=settings.fetch_timeout_seconds,
        max_bytes=settings.max_image_bytes,
        max_attempts=settings.fetch_attempts,
        storage_options=settings.storage_options,
    )


def decode_limits(settings: FetchSettings) -> DecodeLimits:
    """How large and how small an image may be, and what decoding it may take."""
    return DecodeLimits(
        max_pixels=settings.max_image_pixels,
        min_side_pixels=settings.min_image_side_pixels,
        memory_bytes=settings.decode_memory_mib << 20,
        seconds=settings.decode_timeout_seconds,
    )
