"""OpenVINO on a CPU: several batches in flight, one a thread."""

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

if TYPE_CHECKING:  # a network that is compiled already needs no PyTorch
    from batchcls.models.backbone import Backbone

_NEEDS = {"bf16": "BF16", "fp16": "FP16", "int8": "INT8"}


def start(
    bundle: Bundle, choice: EngineChoice, place: EngineConfig, backbone: "Callable[[], Backbone]"
) -> "OpenVino":
    """See `start.start_engine`."""
    if place.device != "cpu":
        raise InputError(
            f"--engine openvino runs on CPUs, not on {place.device}; use --device cpu or --engine torch"
        )
    core = openvino.Core()
    _require(core, choice.precision)
    return OpenVino(Converter(core, bundle, choice, place, backbone))


def _require(core: openvino.Core, precision: Precision) -> None:
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision in _NEEDS and _NEEDS[precision] not in able:
        raise InputError(
            f"--engine openvino --precision {precision}: this processor has no arithmetic for it; use --precision fp32"
        )


class OpenVino(BaseEngine):
    """A converted network. Threads may submit at once; pixels are read where they lie."""

    name: EngineName = "openvino"
    device: Device = "cpu"

    def __init__(self, converter: Converter) -> None:
        """Load the program for uint8 pixels, which is converted first where that was never done.

        Raises:
            InputError: see `Converter.programs`.
        """
        config = converter.bundle.config
        self.precision = converter.choice.precision
        self._converter = converter
        self._lock = threading.Lock()
        self._pools: dict[PixelType, _Pool] = {}
        self.in_flight = self._pool("uint8").size
        super().__init__(
            config.preprocessing.shape, (len(config.labels), config.embedding_dimension), self._begin
        )

    def _begin(self, pixels: NDArray[Any]) -> "_PendingRequest":
        pool = self._pool("uint8" if pixels.dtype == np.uint8 else "float32")
        return pool.submit(np.ascontiguousarray(pixels))

    def _pool(self, pixels: PixelType) -> "_Pool":
        """The program for these pixels; float32 ones are rare, so theirs is loaded when they come."""
        with self._lock:
            if pixels not in self._pools:
                self._pools[pixels] = _Pool(self._converter.programs(pixels), self._converter.place.threads)
            return self._pools[pixels]


class _Pool:
    """Requests, each good for one batch at a time.

    A batch keeps its request until somebody asks for its result, or until the request is needed for
    another batch: then the oldest is waited for and its answer copied out. So a caller may submit as
    much as it likes before it asks, and one that never asks costs nothing.
    """

    def __init__(self, programs: Sequence[openvino.CompiledModel], threads: int) -> None:
        # A program with many streams takes one batch more than it works at, which waits beside them.
        # Among programs with a stream each there is none to wait for whoever is free first.
        each = 1 if len(programs) > 1 else threads + 1
        self._free = deque(program.create_infer_request() for program in programs for _ in range(each))
        self.size = len(self._free)
        self._busy: deque[_PendingRequest] = deque()
        self._changed = threading.Condition()

    def submit(self, pixels: NDArray[Any]) -> "_PendingRequest":
        """Begin to answer C-contiguous N,H,W,3 pixels, N at least 1."""
        request = self._take()
        try:
            request.set_input_tensor(openvino.Tensor(_as_writeable(pixels), shared_memory=True))
            request.start_async()
        except RuntimeError:
            self._give_back(request)
            raise
        pending = _PendingRequest(self, request, pixels)
        with self._changed:
            self._busy.append(pending)
            self._changed.notify()
        return pending

    def settled(self, pending: "_PendingRequest") -> None:
        """A batch has its answer: its request is free, unless another batch was promised it."""
        with self._changed:
            if pending not in self._busy:
                return
            self._busy.remove(pending)
        self._give_back(pending.request)

    def _take(self) -> openvino.InferRequest:
        with self._changed:
            while not self._free and not self._busy:
                self._changed.wait()
            if self._free:
                return self._free.popleft()
            oldest = self._busy.popleft()
        oldest.settle()
        return oldest.request

    def _give_back(self, request: openvino.InferRequest) -> None:
        with self._changed:
            self._free.append(request)
            self._changed.notify()


class _PendingRequest:
    """A batch that a request works on, or its answer."""

    def __init__(self, pool: _Pool, request: openvino.InferRequest, pixels: NDArray[Any]) -> None:
        self.request = request
        self._pool = pool
        self._pixels: NDArray[Any] | None = pixels  # the request reads them where they lie
        self._lock = threading.Lock()
        self._answer: EngineOutput | None = None
        self._error: RuntimeError | None = None

    def result(self) -> EngineOutput:
        """Wait for the answer. Raises RuntimeError if OpenVINO failed."""
        self.settle()
        self._pool.settled(self)
        if self._answer is None:
            raise RuntimeError(f"OpenVINO could not answer this batch: {self._error}") from self._error
        return self._answer

    def settle(self) -> None:
        """Wait for the request and copy its answer, which the next batch overwrites."""
        with self._lock:
            if self._pixels is None:
                return
            try:
                self.request.wait()
                logits, embedding = (
                    self.request.get_tensor(name).data.copy() for name in ("logits", "embedding")
                )
                self._answer = EngineOutput(logits, embedding)
            except RuntimeError as error:
                self._error = error
            self._pixels = None


class _View:
    """The memory of an array, described to NumPy as writeable; keeps the array alive."""

    def __init__(self, pixels: NDArray[Any]) -> None:
        self.pixels = pixels
        self.__array_interface__ = {**pixels.__array_interface__, "data": (pixels.ctypes.data, False)}


def _as_writeable(pixels: NDArray[Any]) -> NDArray[Any]:
    """The same memory. OpenVINO takes only writeable arrays without a copy, though it only reads its input."""
    return pixels if pixels.flags.writeable else np.asarray(_View(pixels))
