"""The OpenVINO engine on a CPU: several batches in flight, one per thread."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
from numpy.typing import NDArray

from batchcls.errors import InputError
from batchcls.models.engines.engine import (
    BaseEngine,
    Device,
    EngineChoice,
    EngineConfig,
    EngineName,
    EngineOutput,
    Precision,
)
from batchcls.models.engines.openvino_convert import Converter, PixelType
from batchcls.models.model_bundle import Bundle

if TYPE_CHECKING:  # a network in the compile cache does not require PyTorch
    from batchcls.models.backbone import Backbone

_REQUIRED_CAPABILITY = {"bf16": "BF16", "fp16": "FP16", "int8": "INT8"}


def start(
    bundle: Bundle, choice: EngineChoice, config: EngineConfig, backbone: "Callable[[], Backbone]"
) -> "OpenVino":
    """See `factory.start_engine`."""
    if config.device != "cpu":
        raise InputError(
            f"--engine openvino runs on CPUs, not on {config.device}; use --device cpu or --engine torch"
        )
    core = openvino.Core()
    _check_precision(core, choice.precision)
    return OpenVino(Converter(core, bundle, choice, config, backbone))


def _check_precision(core: openvino.Core, precision: Precision) -> None:
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision in _REQUIRED_CAPABILITY and _REQUIRED_CAPABILITY[precision] not in capabilities:
        raise InputError(
            f"--engine openvino --precision {precision}: this processor does not support it; use --precision fp32"
        )


class OpenVino(BaseEngine):
    """A converted network. Threads may submit batches concurrently; pixels are read without a copy."""

    name: EngineName = "openvino"
    device: Device = "cpu"

    def __init__(self, converter: Converter) -> None:
        """Load the program for uint8 pixels, and compile it if it is not in the compile cache.

        Raises:
            InputError: see `Converter.load_programs`.
        """
        record = converter.bundle.config
        self.precision = converter.choice.precision
        self._converter = converter
        self._lock = threading.Lock()
        self._pools: dict[PixelType, _RequestPool] = {}
        self.in_flight = self._pool("uint8").size
        super().__init__(
            record.preprocessing.shape, (len(record.labels), record.embedding_dimension), self._start_request
        )

    def _start_request(self, pixels: NDArray[Any]) -> "_PendingRequest":
        pool = self._pool("uint8" if pixels.dtype == np.uint8 else "float32")
        return pool.submit(np.ascontiguousarray(pixels))

    def _pool(self, pixels: PixelType) -> "_RequestPool":
        """Return the requests for a dtype. The program for float32, which is rare, is loaded on its first use."""
        with self._lock:
            if pixels not in self._pools:
                programs = self._converter.load_programs(pixels)
                self._pools[pixels] = _RequestPool(programs, self._converter.config.threads)
            return self._pools[pixels]


class _RequestPool:
    """Inference requests, each of which processes one batch at a time.

    A batch keeps its request until its result is read, or until the request is needed for another batch: the pool
    then waits for the oldest batch and copies its output. A caller may therefore submit any number of batches before
    it reads a result, and a batch whose result is never read does not block a request.
    """

    def __init__(self, programs: Sequence[openvino.CompiledModel], threads: int) -> None:
        # A program with one stream per thread has one additional request, which waits for the first free stream.
        # With one program per thread a waiting request would be bound to one program, even if another is free.
        requests_per_program = 1 if len(programs) > 1 else threads + 1
        self._free = deque(
            program.create_infer_request() for program in programs for _ in range(requests_per_program)
        )
        self.size = len(self._free)
        self._busy: deque[_PendingRequest] = deque()
        self._changed = threading.Condition()

    def submit(self, pixels: NDArray[Any]) -> "_PendingRequest":
        """Submit C-contiguous N,H,W,3 pixels, N at least 1."""
        request = self._acquire()
        try:
            request.set_input_tensor(openvino.Tensor(_as_writeable(pixels), shared_memory=True))
            request.start_async()
        except RuntimeError:
            self._release(request)
            raise
        pending = _PendingRequest(self, request, pixels)
        with self._changed:
            self._busy.append(pending)
            self._changed.notify()
        return pending

    def finish(self, pending: "_PendingRequest") -> None:
        """Release the request of a finished batch, unless another batch has acquired it."""
        with self._changed:
            if pending not in self._busy:
                return
            self._busy.remove(pending)
        self._release(pending.request)

    def _acquire(self) -> openvino.InferRequest:
        with self._changed:
            while not self._free and not self._busy:
                self._changed.wait()
            if self._free:
                return self._free.popleft()
            oldest = self._busy.popleft()
        oldest.wait()
        return oldest.request

    def _release(self, request: openvino.InferRequest) -> None:
        with self._changed:
            self._free.append(request)
            self._changed.notify()


class _PendingRequest:
    """A batch that is processed by a request, or its output."""

    def __init__(self, pool: _RequestPool, request: openvino.InferRequest, pixels: NDArray[Any]) -> None:
        self.request = request
        self._pool = pool
        self._pixels: NDArray[Any] | None = (
            pixels  # kept alive, because the request reads them without a copy
        )
        self._lock = threading.Lock()
        self._output: EngineOutput | None = None
        self._error: RuntimeError | None = None

    def result(self) -> EngineOutput:
        """Wait for the output. Raises RuntimeError if OpenVINO failed."""
        self.wait()
        self._pool.finish(self)
        if self._output is None:
            raise RuntimeError(f"OpenVINO could not process a batch: {self._error}") from self._error
        return self._output

    def wait(self) -> None:
        """Wait for the request and copy its output, which the next batch would overwrite."""
        with self._lock:
            if self._pixels is None:
                return
            try:
                self.request.wait()
                logits, embedding = (
                    self.request.get_tensor(name).data.copy() for name in ("logits", "embedding")
                )
                self._output = EngineOutput(logits, embedding)
            except RuntimeError as error:
                self._error = error
            self._pixels = None


class _WriteableView:
    """The memory of an array, declared to NumPy as writeable; keeps the array alive."""

    def __init__(self, pixels: NDArray[Any]) -> None:
        self.pixels = pixels
        self.__array_interface__ = {**pixels.__array_interface__, "data": (pixels.ctypes.data, False)}


def _as_writeable(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return the same memory as a writeable array.

    OpenVINO copies read-only arrays, although it never writes to its input.
    """
    return pixels if pixels.flags.writeable else np.asarray(_WriteableView(pixels))
