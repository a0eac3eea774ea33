"""A backbone becomes a program for this kind of CPU: exported, its weights folded in, compiled by inductor."""

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
_EXAMPLE_BATCH = 4  # a batch of one would be taken for a constant
_SETTINGS = {
    "freezing": True,
    # A pass runs on one thread; see thread_pool.py.
    "cpp.threads": 1,
    # Headers that are compiled beforehand pay only when many networks are compiled in a row.
    "aot_inductor.precompile_headers": False,
}


def convert(
    program: NormalizedBackbone, shape: tuple[int, int, int], dtype: torch.dtype, folder: Path
) -> None:
    """Write PROGRAM_FILE, which takes batches of any size from 1 on. Takes a minute or so.

    Args:
        program: on the CPU.
        shape: H, W, 3 of an image.
        dtype: of the pixels, uint8 or float32.
        folder: where to write.

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
                inductor_configs=dict(_SETTINGS),
            )
            _take_program(Path(package), folder / PROGRAM_FILE)
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise InputError(
            f"--engine compile: this network cannot be compiled ({reason}); use --engine torch or openvino"
        ) from error


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"--engine compile needs a C++ compiler, and there is no {compiler} here; install one, set CXX, "
            "or use --engine torch or openvino"
        )


def _take_program(package: Path, target: Path) -> None:
    """The one shared library of a package, which has the weights in it.

    Raises:
        ValueError: there is more to it, such as operators that only Python knows.
    """
    with zipfile.ZipFile(package) as archive:
        names = [name for name in archive.namelist() if "/data/aotinductor/" in name]
        libraries = [name for name in names if name.endswith(".so")]
        others = [name for name in names if not name.endswith((".so", ".cpp", "_metadata.json"))]
        if len(libraries) != 1 or others:
            raise ValueError(f"the package holds {len(libraries)} libraries and {len(others)} other files")
        with archive.open(libraries[0]) as source, target.open("wb") as written:
            shutil.copyfileobj(source, written)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks about GPUs that are not there and graphs that nobody asked to see."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
