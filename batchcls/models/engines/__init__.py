"""A backbone on a device: a batch of pixels in, logits and embeddings out, all of it numpy."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

EngineName = Literal["torch"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a network says about N images: logits (N,K float32) and embedding (N,D float32)."""

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]


class Engine(Protocol):
    """Something that runs a backbone. Not made for use by several threads at once."""

    name: EngineName
    device: str
    precision: str

    def answer(self, pixels: NDArray[Any]) -> Answer:
        """Answer N,H,W,3 pixels: uint8, or float32 that is normalised already. They are not changed."""
