"""The compiled PyTorch engines: a program that is compiled ahead of time on a CPU, CUDA graphs on a GPU."""

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
"""Part of the cache key; increment it when the compiled program changes."""


def start(
    bundle: Bundle, choice: EngineChoice, config: EngineConfig, backbone: "Callable[[], Backbone]"
) -> Engine:
    """See `factory.start_engine`."""
    if config.device == "cuda":
        from batchcls.models.engines.cuda_graphs import TorchCudaGraphs  # noqa: PLC0415 - torch takes seconds
        from batchcls.models.engines.torch_eager import check_device_and_precision  # noqa: PLC0415

        check_device_and_precision(choice, config.device)
        return TorchCudaGraphs(backbone(), bundle.config.preprocessing, choice.precision, config)
    if choice.precision not in _PRECISIONS:
        raise InputError(
            f"--engine compile does not support --precision {choice.precision} on a CPU; choose from "
            f"{', '.join(_PRECISIONS)}, or --engine openvino"
        )
    return TorchCompiled(bundle, choice, config, backbone)


class TorchCompiled(BaseEngine):
    """A network that is compiled once per node, on a CPU."""

    name: EngineName = "compile"
    device: Device = "cpu"

    def __init__(
        self, bundle: Bundle, choice: EngineChoice, config: EngineConfig, backbone: "Callable[[], Backbone]"
    ) -> None:
        """Load the program for uint8 pixels, and compile it if it is not in the compile cache.

        Args:
            bundle: the model.
            choice: fp32 or bf16.
            config: `threads` is the number of concurrent forward passes, each in a single thread.
            backbone: builds the network; called only if a program must be compiled.

        Raises:
            InputError: there is no C++ compiler, or the network cannot be compiled.
        """
        self.precision = choice.precision
        self._bundle, self._config, self._backbone = bundle, config, backbone
        self._programs: dict[PixelType, AotProgram] = {}
        self._lock = threading.Lock()
        runner = ThreadPoolRunner(self._run, config.threads, self._program("uint8").use_one_thread)
        self.in_flight = runner.in_flight
        record = bundle.config
        super().__init__(
            record.preprocessing.shape, (len(record.labels), record.embedding_dimension), runner.submit
        )

    def _run(self, pixels: NDArray[Any]) -> EngineOutput:
        return self._program("uint8" if pixels.dtype.name == "uint8" else "float32")(pixels)

    def _program(self, pixels: PixelType) -> AotProgram:
        """Return the program for a dtype. The one for float32, which is rare, is compiled on its first use."""
        with self._lock:
            if pixels not in self._programs:
                folder = self._config.compile_cache.get(self._key(pixels), partial(self._compile, pixels))
                self._programs[pixels] = AotProgram(folder / "program.so", self._config.threads)
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

    def _compile(self, pixels: PixelType, folder: Path) -> None:
        import torch  # noqa: PLC0415 - takes seconds, and is needed only here

        from batchcls.models.engines.torch_eager import NormalizedBackbone  # noqa: PLC0415
        from batchcls.models.engines.torch_export import compile_program  # noqa: PLC0415

        preprocessing = self._bundle.config.preprocessing
        program = NormalizedBackbone(self._backbone(), preprocessing, self.device, self.precision)
        compile_program(program, preprocessing.shape, getattr(torch, pixels), folder)
