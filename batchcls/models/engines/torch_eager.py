"""PyTorch as it is: a backbone on the CPU or a GPU, in float32 or under autocast."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.engines.engine import (
    BaseEngine,
    Device,
    EngineChoice,
    EngineConfig,
    EngineName,
    Precision,
)
from batchcls.models.engines.torch_thread_pool import TorchThreadPool
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing

_DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def check_device_and_precision(choice: EngineChoice, device: Device) -> None:
    """Refuse what PyTorch cannot do here.

    Raises:
        InputError: a GPU that is not there, fp16 on a CPU, or int8.
    """
    if choice.precision not in _DTYPES:
        raise InputError(
            f"--engine {choice.engine} --precision {choice.precision}: PyTorch's engines have no such; choose from "
            f"{', '.join(_DTYPES)}, or --engine openvino"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU here; use --device cpu or auto")
    if device == "cpu" and choice.precision == "fp16":
        raise InputError("--precision fp16 is for GPUs; use bf16 or fp32 on a CPU")


class NormalizedBackbone(nn.Module):
    """N,H,W,3 pixels -> logits and embedding; uint8 ones are normalized first, float32 ones are already.

    Runs under autocast in any precision but fp32.
    """

    def __init__(
        self, backbone: Backbone, preprocessing: Preprocessing, device: Device, precision: Precision
    ) -> None:
        """Move the backbone to the device; this object owns it afterwards."""
        super().__init__()
        if precision == "fp32":
            # Full float32: by default a GPU rounds the inputs of convolutions to ten bits (TF32).
            torch.backends.cudnn.allow_tf32 = False
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.backbone = backbone
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))
        self._device, self._precision = device, precision
        self.to(device)
        self.backbone.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See the class. Seen as N,3,H,W, this memory is channels last already."""
        seen = images.permute(0, 3, 1, 2)
        if images.dtype == torch.uint8:
            seen = seen.to(torch.float32) * self.scale + self.shift
        with self._autocast():
            logits, embedding = self.backbone(seen)
        return logits, embedding

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device, dtype=_DTYPES[self._precision])


_GPU_BATCHES = 3


def start(
    bundle: Bundle, choice: EngineChoice, place: EngineConfig, backbone: Callable[[], Backbone]
) -> "TorchEager":
    """See `start.start_engine`."""
    check_device_and_precision(choice, place.device)
    preprocessing = bundle.config.preprocessing
    return TorchEager(backbone(), preprocessing, place.device, choice.precision, place.threads)


class TorchEager(BaseEngine):
    """A backbone in plain PyTorch: inference mode, channels last, normalization on the device.

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
            backbone: owned by the engine afterwards; its weights move to the device.
            preprocessing: of the backbone's weights; mean, std and input size are used.
            device: cpu or cuda.
            precision: fp32, bf16 or fp16; see `check_device_and_precision`.
            threads: CPU threads of this process for one operation, at least 1.
        """
        self.device: Device = device
        self.precision: Precision = precision
        self.in_flight = _GPU_BATCHES if device == "cuda" else 2
        network = NormalizedBackbone(backbone, preprocessing, device, precision)
        work = TorchThreadPool(network, device, _GPU_BATCHES if device == "cuda" else 1, threads)
        super().__init__(preprocessing.shape, (backbone.classes, backbone.dimension), work.submit)
