"""PyTorch as it is: a backbone on the CPU or a GPU, in float32 or under autocast."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.models.backbone import Backbone
from batchcls.models.bundle import Bundle
from batchcls.models.engines import (
    Answer,
    Device,
    EngineChoice,
    EngineName,
    EnginePlace,
    Pending,
    Precision,
    Ready,
)
from batchcls.models.engines.pixels import require_pixels
from batchcls.models.engines.torch_input import NormalisedBackbone, check_device_and_precision
from batchcls.models.engines.torch_threads import TorchThreads
from batchcls.preprocessing import Preprocessing

_GPU_BATCHES = 3


def start(
    bundle: Bundle, choice: EngineChoice, place: EnginePlace, backbone: Callable[[], Backbone]
) -> "TorchEager":
    """See `start.start_engine`."""
    check_device_and_precision(choice, place.device)
    preprocessing = bundle.config.preprocessing
    return TorchEager(backbone(), preprocessing, place.device, choice.precision, place.threads)


class TorchEager:
    """A backbone in plain PyTorch: inference mode, channels last, normalisation on the device.

    On a CPU one batch is answered at a time, by all threads, and the next one waits beside it.
    """

    name: EngineName = "torch"

    def __init__(
        self,
        backbone: Backbone,
        preprocessing: Preprocessing,
        device: Device,
        precision: Precision,
        threads: int,
    ) -> None:
        """Move the backbone to the device.

        Args:
            backbone: taken over; its weights move to the device.
            preprocessing: of the backbone's weights; mean, std and input size are used.
            device: cpu or cuda.
            precision: fp32, bf16 or fp16; see `check_device_and_precision`.
            threads: CPU threads of this process for one operation, at least 1.
        """
        self.device: Device = device
        self.precision: Precision = precision
        self.in_flight = _GPU_BATCHES if device == "cuda" else 2
        self._shape = preprocessing.shape
        self._widths = backbone.classes, backbone.dimension
        network = NormalisedBackbone(backbone, preprocessing, device, precision)
        self._threads = TorchThreads(network, device, _GPU_BATCHES if device == "cuda" else 1, threads)

    def submit(self, pixels: NDArray[Any]) -> Pending:
        """Begin to answer; see `engines.Engine`.

        Raises:
            ValueError: another shape or dtype than the preprocessing gives.
        """
        require_pixels(pixels, self._shape)
        if len(pixels) == 0:
            return Ready(Answer(*(np.empty((0, width), np.float32) for width in self._widths)))
        return self._threads.submit(pixels)

    def answer(self, pixels: NDArray[Any]) -> Answer:
        """Logits and embeddings of N,H,W,3 pixels: uint8, or float32 that is normalised already.

        Raises:
            ValueError: another shape or dtype than the preprocessing gives.
        """
        return self.submit(pixels).result()
