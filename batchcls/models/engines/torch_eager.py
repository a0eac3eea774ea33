"""PyTorch as it is: a backbone on the CPU or a GPU, in float32 or under autocast."""

from collections.abc import Callable

from batchcls.models.backbone import Backbone
from batchcls.models.bundle import Bundle
from batchcls.models.engines import (
    Device,
    EngineChoice,
    EngineName,
    EnginePlace,
    Precision,
)
from batchcls.models.engines.submission import Submission
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


class TorchEager(Submission):
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
        network = NormalisedBackbone(backbone, preprocessing, device, precision)
        work = TorchThreads(network, device, _GPU_BATCHES if device == "cuda" else 1, threads)
        super().__init__(preprocessing.shape, (backbone.classes, backbone.dimension), work.submit)
