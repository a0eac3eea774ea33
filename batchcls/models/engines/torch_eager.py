"""PyTorch as it is: a backbone on the CPU or a GPU, in float32 or under autocast."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.engines import Answer, EngineName
from batchcls.preprocessing import Preprocessing

_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICES = ("auto", "cpu", "cuda")


def choose_device_and_precision(device: str, precision: str) -> tuple[str, str]:
    """Settle `auto`: a GPU if there is one, with bf16 (fp16 where it has none); else CPU and fp32.

    Returns:
        `cpu` or `cuda`, and `fp32`, `bf16` or `fp16`.

    Raises:
        InputError: an unknown name, a GPU that is not there, or fp16 on a CPU.
    """
    if device not in _DEVICES:
        raise InputError(f"--device {device}: unknown; choose from {', '.join(_DEVICES)}")
    if precision != "auto" and precision not in _DTYPES:
        raise InputError(
            f"--precision {precision}: the torch engine has no such; choose from auto, {', '.join(_DTYPES)}"
        )
    present = torch.cuda.is_available()
    if device == "cuda" and not present:
        raise InputError("--device cuda: PyTorch finds no GPU here; use --device cpu or auto")
    if device == "cpu" or not present:
        if precision == "fp16":
            raise InputError("--precision fp16 is for GPUs; use bf16 or fp32 on a CPU")
        return "cpu", "fp32" if precision == "auto" else precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "cuda", precision


class TorchEager:
    """A backbone in plain PyTorch: inference mode, channels last, normalisation on the device.

    Pixels are copied once into a buffer of the engine's own, which is page-locked when a GPU reads
    it, so an array that must not be written to (a block in shared memory) is fine.
    """

    name: EngineName = "torch"

    def __init__(
        self, backbone: Backbone, preprocessing: Preprocessing, device: str, precision: str, threads: int
    ) -> None:
        """Move the backbone to the device.

        Args:
            backbone: taken over; its weights move to the device.
            preprocessing: of the backbone's weights; mean, std and input size are used.
            device: cpu or cuda.
            precision: fp32, bf16 or fp16; see `choose_device_and_precision`.
            threads: CPU threads of this process for one operation, at least 1.
        """
        torch.set_num_threads(threads)
        if precision == "fp32":
            # Full float32: by default a GPU rounds the inputs of convolutions to ten bits (TF32).
            torch.backends.cudnn.allow_tf32 = False
        self.device, self.precision = device, precision
        self._backbone = backbone.to(device).to(memory_format=torch.channels_last)
        self._shape = preprocessing.shape
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self._scale = (1 / (255 * std)).view(1, 3, 1, 1).to(device)
        self._shift = (-mean / std).view(1, 3, 1, 1).to(device)
        self._staging = torch.empty(0, *self._shape, dtype=torch.uint8)

    def answer(self, pixels: NDArray[Any]) -> Answer:
        """Logits and embeddings of N,H,W,3 pixels: uint8, or float32 that is normalised already.

        Raises:
            ValueError: another shape or dtype than the preprocessing gives.
        """
        if pixels.shape[1:] != self._shape or pixels.dtype not in (np.uint8, np.float32):
            raise ValueError(
                f"expected N x {self._shape} of uint8 or float32, got {pixels.shape} of {pixels.dtype}"
            )
        if len(pixels) == 0:
            sizes = (self._backbone.classes, self._backbone.dimension)
            return Answer(*(np.empty((0, size), np.float32) for size in sizes))
        with torch.inference_mode(), self._autocast():
            logits, embedding = self._backbone(self._normalised(self._stage(pixels)))
            return Answer(logits.cpu().numpy(), embedding.cpu().numpy())

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device, dtype=_DTYPES[self.precision])

    def _stage(self, pixels: NDArray[Any]) -> torch.Tensor:
        """The pixels as a tensor that PyTorch may hold on to, without a warning or a write to them.

        The buffer is used again for the next batch: by then the answer has been read, and with it
        the copy to the device is over.
        """
        dtype = torch.uint8 if pixels.dtype == np.uint8 else torch.float32
        if len(self._staging) < len(pixels) or self._staging.dtype != dtype:
            self._staging = torch.empty(pixels.shape, dtype=dtype, pin_memory=self.device == "cuda")
        staged = self._staging[: len(pixels)]
        np.copyto(staged.numpy(), pixels)
        return staged

    def _normalised(self, staged: torch.Tensor) -> torch.Tensor:
        """N,3,H,W float32 on the device; seen this way, N,H,W,3 memory is channels last already."""
        images = staged.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        if images.dtype != torch.uint8:
            return images
        return images.to(torch.float32).mul_(self._scale).add_(self._shift)
