"""How large and how small an image may be, and what decoding it may take."""

from collections.abc import Callable
from dataclasses import dataclass

from batchcls.errors import InputError

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
    `batchcls.images.memory` reckons it; one that takes more is decoded alone. `seconds` is how much
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
