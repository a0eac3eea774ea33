"""Runs a network that inductor compiled ahead of time for a CPU, through the program's C interface.

PyTorch's own loader holds the GIL during a forward pass, so no image could be decoded at the same time, and importing
PyTorch takes seconds. A call through ctypes releases the GIL, and the program requires only PyTorch's C++ library. The
functions that are called here are declared in `torch/csrc/inductor/aoti_runtime/interface.h` and
`torch/csrc/inductor/aoti_torch/c/shim.h`, both of which are designed to be stable.
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

_NUM_OUTPUTS = 2
_NO_DEVICE_INDEX = -1


class AotProgram:
    """A compiled network: N,H,W,3 pixels -> logits and embedding. Several threads may call it concurrently."""

    def __init__(self, path: Path, num_runners: int) -> None:
        """Load a program.

        Args:
            path: the shared library that `torch_export.compile_program` wrote.
            num_runners: number of concurrent calls; further calls wait.

        Raises:
            InputError: the program or PyTorch's C++ library cannot be loaded.
        """
        try:
            self._torch = _load_torch_library()
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
        _check_status(create(byref(self._container), num_runners, b"cpu", None), "could not be loaded")

    def use_one_thread(self) -> None:
        """Restrict the forward passes of the calling thread to one core."""
        self._torch.omp_set_num_threads(1)

    def __call__(self, pixels: NDArray[Any]) -> EngineOutput:
        """Run a forward pass.

        Args:
            pixels: N,H,W,3 with N at least 1, in any memory layout, of the dtype that the program was compiled for.

        Raises:
            RuntimeError: the program failed; the reason is on stderr.
        """
        contiguous = np.ascontiguousarray(pixels)
        outputs = (c_void_p * _NUM_OUTPUTS)()
        run = self._program.AOTInductorModelContainerRun
        run.argtypes = (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p)
        # The program frees the handle; the memory stays owned by the array.
        inputs = (c_void_p * 1)(self._create_tensor(contiguous))
        status = run(self._container, inputs, 1, outputs, _NUM_OUTPUTS, None, None)
        _check_status(status, "could not process a batch")
        handles = [c_void_p(output) for output in outputs]
        try:
            logits, embedding = (self._copy_matrix(handle) for handle in handles)
        finally:
            for handle in handles:
                self._torch.aoti_torch_delete_tensor_object(handle)
        return EngineOutput(logits, embedding)

    def _create_tensor(self, array: NDArray[Any]) -> int | None:
        """Return the handle of a tensor that shares the memory of an array."""
        handle = c_void_p()
        sizes = (c_int64 * array.ndim)(*array.shape)
        strides = (c_int64 * array.ndim)(*(stride // array.itemsize for stride in array.strides))
        create = self._torch.aoti_torch_create_tensor_from_blob
        create.argtypes = (
            c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int32, c_int32, c_int32, c_void_p
        )  # fmt: skip
        status = create(
            array.ctypes.data,
            array.ndim,
            sizes,
            strides,
            0,
            self._dtypes[array.dtype],
            self._torch.aoti_torch_device_type_cpu(),
            _NO_DEVICE_INDEX,
            byref(handle),
        )
        _check_status(status, "could not read the input pixels")
        return handle.value

    def _copy_matrix(self, handle: c_void_p) -> NDArray[np.float32]:
        """Copy a float32 output matrix of the program."""
        data, sizes, strides = POINTER(c_float)(), POINTER(c_int64)(), POINTER(c_int64)()
        for name, value in (("data_ptr", data), ("sizes", sizes), ("strides", strides)):
            status = getattr(self._torch, f"aoti_torch_get_{name}")(handle, byref(value))
            _check_status(status, "returned an output that cannot be read")
        shape, steps = (sizes[0], sizes[1]), (strides[0], strides[1])
        length = 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        flat = np.ctypeslib.as_array(data, (length,))
        itemsize = flat.itemsize
        return np.lib.stride_tricks.as_strided(flat, shape, (steps[0] * itemsize, steps[1] * itemsize)).copy()


def _load_torch_library() -> ctypes.CDLL:
    """Load PyTorch's C++ library without importing PyTorch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise OSError("PyTorch is not installed")
    path = str(Path(spec.origin).parent / "lib" / "libtorch.so")
    try:
        return ctypes.CDLL(path)
    except OSError:
        if "torch" in sys.modules:
            raise
        # A GPU build may depend on libraries that only PyTorch's import can locate.
        importlib.import_module("torch")
        return ctypes.CDLL(path)


def _check_status(status: int, problem: str) -> None:
    if status:
        raise RuntimeError(f"the compiled network {problem}; the reason is on stderr")
