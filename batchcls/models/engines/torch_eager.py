"""The eager PyTorch engine: a backbone on a CPU or a GPU, in float32 or under autocast."""

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
    """Check that PyTorch supports the precision on the device.

    Raises:
        InputError: the device is a GPU and there is none, or the precision is int8, or fp16 on a CPU.
    """
    if choice.precision not in _DTYPES:
        raise InputError(
            f"--engine {choice.engine} does not support --precision {choice.precision}; choose from "
            f"{', '.join(_DTYPES)}, or --engine openvino"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU on this machine; use --device cpu or auto")
    if device == "cpu" and choice.precision == "fp16":
        raise InputError("--precision fp16 requires a GPU; use bf16 or fp32 on a CPU")


class NormalizedBackbone(nn.Module):
    """N,H,W,3 pixels -> logits and embedding. uint8 pixels are normalized; float32 pixels already are.

    Runs under autocast in every precision except fp32.
    """

    def __init__(
        self, backbone: Backbone, preprocessing: Preprocessing, device: Device, precision: Precision
    ) -> None:
        """Move the backbone to the device; it is owned by this module afterwards."""
        super().__init__()
        if precision == "fp32":
            # Full float32: by default a GPU rounds the inputs of convolutions to a mantissa of ten bits (TF32).
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
        """Return logits (N,K) and embedding (N,D)."""
        inputs = images.permute(0, 3, 1, 2)  # a view, whose memory format is channels last
        if images.dtype == torch.uint8:
            inputs = inputs.to(torch.float32) * self.scale + self.shift
        with self._autocast():
            logits, embedding = self.backbone(inputs)
        return logits, embedding

    def _autocast(self) -> AbstractContextManager[object]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast(self._device, dtype=_DTYPES[self._precision])


_GPU_BATCHES = 3


def start(
    bundle: Bundle, choice: EngineChoice, config: EngineConfig, backbone: Callable[[], Backbone]
) -> "TorchEager":
    """See `factory.start_engine`."""
    check_device_and_precision(choice, config.device)
    preprocessing = bundle.config.preprocessing
    return TorchEager(backbone(), preprocessing, config.device, choice.precision, config.threads)


class TorchEager(BaseEngine):
    """A backbone in eager PyTorch: inference mode, channels last, normalization on the device.

    On a CPU one batch runs at a time, on all threads, while the next one waits.
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
            threads: CPU threads of one PyTorch operation, at least 1.
        """
        self.device: Device = device
        self.precision: Precision = precision
        self.in_flight = _GPU_BATCHES if device == "cuda" else 2
        network = NormalizedBackbone(backbone, preprocessing, device, precision)
        pool = TorchThreadPool(network, device, _GPU_BATCHES if device == "cuda" else 1, threads)
        super().__init__(preprocessing.shape, (backbone.classes, backbone.dimension), pool.submit)
