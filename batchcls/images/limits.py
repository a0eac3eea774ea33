"""How large and how small a picture may be."""

from dataclasses import dataclass

from batchcls.errors import InputError


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """What is refused before a pixel is allocated.

    `max_pixels`, at least 1: the default is a quarter of a GiB of RGB, above the 50 and 61
    megapixels of today's cameras and equal to where Pillow begins to warn. A worker needs about
    3 bytes a pixel and thread, 9 for progressive JPEG. A higher one raises Pillow's own limit
    with it. `min_side_pixels`, at least 1: shorter sides are tracking pixels and rules, not pictures.
    """

    max_pixels: int = 89_478_485
    min_side_pixels: int = 8

    def __post_init__(self) -> None:
        for name in ("max_pixels", "min_side_pixels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
