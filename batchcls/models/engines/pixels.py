"""What every engine asks of the pixels that it is given."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def require_pixels(pixels: NDArray[Any], shape: tuple[int, int, int]) -> None:
    """Refuse pixels that are no batch of one network's input.

    Args:
        pixels: what should be N,H,W,3 uint8 or float32.
        shape: H, W, 3 of one image.

    Raises:
        ValueError: another shape or dtype than the preprocessing gives.
    """
    if pixels.shape[1:] != shape or pixels.dtype not in (np.uint8, np.float32):
        raise ValueError(f"expected N x {shape} of uint8 or float32, got {pixels.shape} of {pixels.dtype}")
