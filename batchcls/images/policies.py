"""What a job's settings mean for fetching and decoding."""

from batchcls.config.common import FetchSettings
from batchcls.images.addresses import AddressPolicy
from batchcls.images.fetch import FetchPolicy
from batchcls.images.limits import DecodeLimits


def fetch_policy(settings: FetchSettings) -> FetchPolicy:
    """Which addresses are read, how long, how often and with which credentials."""
    return FetchPolicy(
        addresses=AddressPolicy(tuple(settings.allow_root), settings.allow_private_addresses),
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
