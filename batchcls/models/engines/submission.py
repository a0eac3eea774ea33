"""What is the same in every engine: how pixels are taken in."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.models.engines import Answer, Pending, Ready


class Submission:
    """The two ways to ask an engine, over its own way to answer a batch."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        widths: tuple[int, int],
        begin: Callable[[NDArray[Any]], Pending],
    ) -> None:
        """Take what the engine is.

        Args:
            shape: H, W, 3 of one image.
            widths: number of classes, and dimension of the embedding.
            begin: begins to answer N,H,W,3 uint8 or float32 pixels, N at least 1.
        """
        self._shape, self._widths, self._begin = shape, widths, begin

    def submit(self, pixels: NDArray[Any]) -> Pending:
        """Begin to answer; see `engines.Engine`.

        Raises:
            ValueError: another shape or dtype than the preprocessing gives.
        """
        if pixels.shape[1:] != self._shape or pixels.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"expected N x {self._shape} of uint8 or float32, got {pixels.shape} of {pixels.dtype}"
            )
        if len(pixels) == 0:
            return Ready(Answer(*(np.empty((0, width), np.float32) for width in self._widths)))
        return self._begin(pixels)

    def answer(self, pixels: NDArray[Any]) -> Answer:
        """Logits and embeddings of N,H,W,3 pixels: uint8, or float32 that is normalised already.

        Raises:
            ValueError: another shape or dtype than the preprocessing gives.
        """
        return self.submit(pixels).result()
