"""Compiles a backbone ahead of time for this kind of CPU: exported, with constant weights, compiled by inductor."""

import logging
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._inductor import aoti_compile_and_package
from torch._inductor.utils import fresh_cache

from batchcls.errors import InputError
from batchcls.models.engines.torch_eager import NormalizedBackbone

PROGRAM_FILE = "program.so"

_LARGEST_BATCH = 4096
_EXAMPLE_BATCH = 4  # torch.export would specialize on a batch of one
_INDUCTOR_CONFIG = {
    "freezing": True,
    # A forward pass runs on one thread; see thread_pool.py.
    "cpp.threads": 1,
    # Precompiled headers pay off only if many networks are compiled in a row.
    "aot_inductor.precompile_headers": False,
}


def compile_program(
    program: NormalizedBackbone, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path
) -> None:
    """Compile a network to PROGRAM_FILE, which accepts batches of 1 to 4096 images. Takes about a minute.

    Args:
        program: the network, on the CPU.
        shape: H, W, 3 of an image.
        dtype: dtype of the pixels, uint8 or float32.
        folder: folder of PROGRAM_FILE.

    Raises:
        InputError: there is no C++ compiler, or the network cannot be compiled.
    """
    _require_compiler()
    example = torch.zeros(_EXAMPLE_BATCH, *shape, dtype=dtype)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    try:
        with _quiet(), torch.no_grad(), fresh_cache(), tempfile.TemporaryDirectory() as scratch:
            exported = torch.export.export(program, (example,), dynamic_shapes={"images": {0: batch}})
            package = aoti_compile_and_package(
                exported,
                package_path=str(Path(scratch) / "package.pt2"),
                inductor_configs=dict(_INDUCTOR_CONFIG),
            )
            _extract_library(Path(package), folder / PROGRAM_FILE)
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise InputError(
            f"--engine compile: this network cannot be compiled ({reason}); use --engine torch or openvino"
        ) from error


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"--engine compile requires a C++ compiler, and {compiler} is not installed; install one, set CXX, "
            "or use --engine torch or openvino"
        )


def _extract_library(package: Path, target: Path) -> None:
    """Extract the shared library of a package, which contains the weights.

    Raises:
        ValueError: the package contains other files, for example for operators that run in Python only.
    """
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if "/data/aotinductor/" in name]
        libraries = [name for name in names if name.endswith(".so")]
        others = [name for name in names if not name.endswith((".so", ".cpp", "_metadata.json"))]
        if len(libraries) != 1 or others:
            raise ValueError(f"the package contains {len(libraries)} libraries and {len(others)} other files")
        with archive.open(libraries[0]) as source, target.open("wb") as destination:
            shutil.copyfileobj(source, destination)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log lines, such as those about missing GPUs."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
