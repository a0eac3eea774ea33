"""Engines of compiled PyTorch: an ahead-of-time program of this node on a CPU, CUDA graphs on a GPU."""

import threading
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from batchcls.errors import InputError
from batchcls.hardware import Hardware
from batchcls.models.engines.aot_program import AotProgram
from batchcls.models.engines.engine import (
    BaseEngine,
    Device,
    Engine,
    EngineChoice,
    EngineConfig,
    EngineName,
    EngineOutput,
)
from batchcls.models.engines.thread_pool import ThreadPoolRunner
from batchcls.models.model_bundle import Bundle

if TYPE_CHECKING:
    from batchcls.models.backbone import Backbone

PixelType = Literal["uint8", "float32"]

_PRECISIONS = ("fp32", "bf16")

_FORMAT = "1"
"""Goes up when what is compiled here changes."""


def start(
    bundle: Bundle, choice: EngineChoice, place: EngineConfig, backbone: "Callable[[], Backbone]"
) -> Engine:
    """See `start.start_engine`."""
    if place.device == "cuda":
        from batchcls.models.engines.cuda_graphs import TorchCudaGraphs  # noqa: PLC0415 - torch takes seconds
        from batchcls.models.engines.torch_eager import check_device_and_precision  # noqa: PLC0415

        check_device_and_precision(choice, place.device)
        return TorchCudaGraphs(backbone(), bundle.config.preprocessing, choice.precision, place)
    if choice.precision not in _PRECISIONS:
        raise InputError(
            f"--engine compile --precision {choice.precision}: on a CPU choose from {', '.join(_PRECISIONS)}, "
            "or --engine openvino"
        )
    return TorchCompiled(bundle, choice, place, backbone)


class TorchCompiled(BaseEngine):
    """A network that is compiled once a node, on a CPU."""

    name: EngineName = "compile"
    device: Device = "cpu"

    def __init__(
        self, bundle: Bundle, choice: EngineChoice, place: EngineConfig, backbone: "Callable[[], Backbone]"
    ) -> None:
        """Load the program for uint8 pixels, which is compiled first where that was never done.

        Args:
            bundle: the model.
            choice: fp32 or bf16.
            place: its threads are forward passes at a time, each in one thread.
            backbone: builds the network; called only if there is something to compile.

        Raises:
            InputError: there is no C++ compiler, or the network cannot be compiled.
        """
        self.precision = choice.precision
        self._bundle, self._place, self._backbone = bundle, place, backbone
        self._programs: dict[PixelType, AotProgram] = {}
        self._lock = threading.Lock()
        work = ThreadPoolRunner(self._run, place.threads, self._program("uint8").one_thread)
        self.in_flight = work.in_flight
        config = bundle.config
        super().__init__(
            config.preprocessing.shape, (len(config.labels), config.embedding_dimension), work.submit
        )

    def _run(self, pixels: NDArray[Any]) -> EngineOutput:
        return self._program("uint8" if pixels.dtype.name == "uint8" else "float32")(pixels)

    def _program(self, pixels: PixelType) -> AotProgram:
        """The program for these pixels; float32 ones are rare, so theirs is made when they come."""
        with self._lock:
            if pixels not in self._programs:
                folder = self._place.compile_cache.get(self._key(pixels), partial(self._convert, pixels))
                self._programs[pixels] = AotProgram(folder / "program.so", self._place.threads)
            return self._programs[pixels]

    def _key(self, pixels: PixelType) -> dict[str, str]:
        hardware = Hardware.detect()
        return {
            "name": f"compile-{self._bundle.config.architecture}-{self.precision}",
            "format": _FORMAT,
            "bundle": self._bundle.fingerprint,
            "torch": version("torch"),
            "processor": f"{hardware.processor} ({', '.join(hardware.features)})",
            "precision": self.precision,
            "pixels": pixels,
        }

    def _convert(self, pixels: PixelType, folder: Path) -> None:
        import torch  # noqa: PLC0415 - takes seconds, and is needed only here

        from batchcls.models.engines.torch_eager import NormalizedBackbone  # noqa: PLC0415
        from batchcls.models.engines.torch_export import convert  # noqa: PLC0415

        preprocessing = self._bundle.config.preprocessing
        program = NormalizedBackbone(self._backbone(), preprocessing, self.device, self.precision)
        convert(program, preprocessing.shape, getattr(torch, pixels), folder)
