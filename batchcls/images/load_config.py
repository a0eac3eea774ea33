"""Settings of fetching and decoding images."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from batchcls.config.common_config import FetchSettings
from batchcls.errors import InputError
from batchcls.images.fetch import FetchPolicy
from batchcls.images.url_policy import AddressPolicy
from batchcls.preprocessing import Preprocessing, Views

MinDecodedSize = Callable[[int, int], tuple[float, float]]
"""Maps the height and width of an upright image to the smallest ones that it may be decoded at."""


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Limits that are checked before pixels are allocated.

    Attributes:
        max_pixels: at least 1. The default is a quarter of a GiB of RGB: above the 50 and 61 megapixels of
            current cameras, and equal to the limit at which Pillow warns. A higher value raises Pillow's limit too.
        min_side_pixels: at least 1; images with shorter sides are tracking pixels and rules.
        memory_bytes: memory of all images that a process decodes concurrently, as `decode_memory` estimates it;
            an image that needs more is decoded alone.
        seconds: CPU time of decoding one image.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """Settings of a loader, which fetches and decodes the images of its rows.

    Attributes:
        base: URI against which relative image URIs are resolved.
        fetch: how images are fetched.
        limits: limits of decoding.
        preprocessing: of the network.
        large_preprocessing: of the large network of a cascade; None without one, and where it takes the same pixels.
        fetch_threads: images that are fetched concurrently.
        block_rows: rows of a block of decoded images.
        decode_threads: images that are decoded concurrently.
        views: crops and flips of each image.
        normalize: whether pixels are returned as uint8 ("engine") or as normalized float32 ("worker").
        kept: columns of the manifest that are copied to the output.
        decode_margin: JPEGs are decoded at a reduced scale at which they are at least this many times as high and
            wide as the resize needs; None: at full scale.
        share_predictions: whether images with the same content are decoded and predicted once.
        run_id: identifies the settings in a process that serves several runs.
    """

    base: str
    fetch: FetchPolicy
    limits: DecodeLimits
    preprocessing: Preprocessing
    fetch_threads: int
    block_rows: int
    decode_threads: int = 1
    views: Views = field(default_factory=Views)
    normalize: Literal["engine", "worker"] = "engine"
    kept: tuple[pa.Field, ...] = ()
    decode_margin: float | None = None
    share_predictions: bool = True
    run_id: str = ""
    large_preprocessing: Preprocessing | None = None


def fetch_policy(settings: FetchSettings) -> FetchPolicy:
    """Return the fetch policy of a job: permitted addresses, timeouts, attempts and credentials."""
    return FetchPolicy(
        addresses=AddressPolicy(tuple(settings.allowed_root), settings.allow_private_addresses),
        timeout_seconds=settings.fetch_timeout_seconds,
        max_bytes=settings.max_image_bytes,
        max_attempts=settings.fetch_attempts,
        storage_options=settings.storage_options,
    )


def decode_limits(settings: FetchSettings) -> DecodeLimits:
    """Return the decode limits of a job: image size, memory and time."""
    return DecodeLimits(
        max_pixels=settings.max_image_pixels,
        min_side_pixels=settings.min_image_side_pixels,
        memory_bytes=settings.decode_memory_mib << 20,
        seconds=settings.decode_timeout_seconds,
    )
