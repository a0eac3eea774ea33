"""A program that inductor compiled for a CPU, called through its C interface.

PyTorch's own loader holds Python's lock during a pass, so that no image is decoded meanwhile, and
importing PyTorch takes seconds. A call through ctypes gives the lock away, and the program needs
PyTorch's C++ library only. What is called here is declared in `torch/csrc/inductor/aoti_runtime/
interface.h` and `torch/csrc/inductor/aoti_torch/c/shim.h`, both of which are made to be stable.
"""

import ctypes
import importlib.util
import sys
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchcls.errors import InputError
from batchcls.models.engines.engine import EngineOutput

_OUTPUTS = 2
_NO_INDEX = -1


class AotProgram:
    """N,H,W,3 pixels in, logits and embedding out. Threads may call it at once."""

    def __init__(self, path: Path, runners: int) -> None:
        """Load a program.

        Args:
            path: what `torch_convert.convert` has made.
            runners: calls that are answered at a time; others wait.

        Raises:
            InputError: the program or PyTorch's library cannot be loaded.
        """
        try:
            self._torch = _library()
            self._program = ctypes.CDLL(str(path))
        except OSError as error:
            raise InputError(
                f"--engine compile: the compiled network cannot be loaded ({error}); use --engine torch"
            ) from error
        self._dtypes = {
            np.dtype(np.uint8): self._torch.aoti_torch_dtype_uint8(),
            np.dtype(np.float32): self._torch.aoti_torch_dtype_float32(),
        }
        self._container = c_void_p()
        create = self._program.AOTInductorModelContainerCreateWithDevice
        create.argtypes = (c_void_p, c_size_t, c_char_p, c_char_p)
        _require(create(byref(self._container), runners, b"cpu", None), "be loaded")

    def one_thread(self) -> None:
        """Let passes that this thread begins use one core."""
        self._torch.omp_set_num_threads(1)

    def __call__(self, pixels: NDArray[Any]) -> EngineOutput:
        """EngineOutput N,H,W,3 pixels, N at least 1, of the type that the program was made for; they may lie anyhow.

        Raises:
            RuntimeError: the program failed; why stands on stderr.
        """
        ordered = np.ascontiguousarray(pixels)
        outputs = (c_void_p * _OUTPUTS)()
        run = self._program.AOTInductorModelContainerRun
        run.argtypes = (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p)
        # The program frees the handle; the memory behind it stays the array's.
        inputs = (c_void_p * 1)(self._handle(ordered))
        _require(run(self._container, inputs, 1, outputs, _OUTPUTS, None, None), "answer this batch")
        handles = [c_void_p(output) for output in outputs]
        try:
            logits, embedding = (self._copied(handle) for handle in handles)
        finally:
            for handle in handles:
                self._torch.aoti_torch_delete_tensor_object(handle)
        return EngineOutput(logits, embedding)

    def _handle(self, array: NDArray[Any]) -> int | None:
        found = c_void_p()
        sizes = (c_int64 * array.ndim)(*array.shape)
        strides = (c_int64 * array.ndim)(*(stride // array.itemsize for stride in array.strides))
        create = self._torch.aoti_torch_create_tensor_from_blob
        create.argtypes = (
            c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int32, c_int32, c_int32, c_void_p
        )  # fmt: skip
        failed = create(
            array.ctypes.data,
            array.ndim,
            sizes,
            strides,
            0,
            self._dtypes[array.dtype],
            self._torch.aoti_torch_device_type_cpu(),
            _NO_INDEX,
            byref(found),
        )
        _require(failed, "take these pixels")
        return found.value

    def _copied(self, handle: c_void_p) -> NDArray[np.float32]:
        """A matrix of float32 that the program has answered."""
        data, sizes, strides = POINTER(c_float)(), POINTER(c_int64)(), POINTER(c_int64)()
        for name, found in (("data_ptr", data), ("sizes", sizes), ("strides", strides)):
            _require(getattr(self._torch, f"aoti_torch_get_{name}")(handle, byref(found)), "be read")
        shape, steps = (sizes[0], sizes[1]), (strides[0], strides[1])
        reach = 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        flat = np.ctypeslib.as_array(data, (reach,))
        width = flat.itemsize
        return np.lib.stride_tricks.as_strided(flat, shape, (steps[0] * width, steps[1] * width)).copy()


def _library() -> ctypes.CDLL:
    """PyTorch's C++ library, without the rest of it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise OSError("PyTorch is not installed")
    path = str(Path(found.origin).parent / "lib" / "libtorch.so")
    try:
        return ctypes.CDLL(path)
    except OSError:
        if "torch" in sys.modules:
            raise
        # A build for GPUs may need libraries that only the import knows where to find.
        importlib.import_module("torch")
        return ctypes.CDLL(path)


def _require(failed: int, what: str) -> None:
    if failed:
        raise RuntimeError(f"the compiled network cannot {what}; the reason stands on stderr")
