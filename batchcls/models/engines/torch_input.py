"""What both PyTorch engines do with pixels before the network: normalise them on the device."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.engines import Device, EngineChoice, Precision
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


class NormalisedBackbone(nn.Module):
    """N,H,W,3 pixels -> logits and embedding; uint8 ones are normalised first, float32 ones are already.

    Runs under autocast in any precision but fp32.
    """

    def __init__(
        self, backbone: Backbone, preprocessing: Preprocessing, device: Device, precision: Precision
    ) -> None:
        """Move the backbone to the device; it is taken over."""
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
