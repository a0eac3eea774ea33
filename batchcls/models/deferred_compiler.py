"""Imports torchvision and timm without the compiler of PyTorch, which batchcls needs only for the engine `compile`.

Both libraries import `torch._dynamo` when they are imported: torchvision for one function that its RoI align operator
calls, timm to apply `torch.compiler.disable` to one method. That is a third of the CPU time in which a process of a
job starts (docs/measurements/startup.md). While they are imported, substitutes for the two functions import the
compiler when they are called, and everything else of the compiler is imported as usual.

Does not import PyTorch.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_COMPILER, _UTILITIES = "torch._dynamo", "torch._dynamo.utils"
_LIBRARIES = ("torchvision", "timm")


def defer_compiler() -> None:
    """Let later imports of torchvision and timm in this process not import the compiler of PyTorch."""
    if not any(isinstance(finder, _LibraryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LibraryFinder())


class _LibraryFinder(MetaPathFinder):
    """Finds the libraries as Python does, and imports them without the compiler."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _COMPILER:
            _remove_substitute()
        if fullname not in _LIBRARIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _without_compiler(spec.loader.exec_module)  # type: ignore[assignment]
        return spec


def _without_compiler(exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def execute(module: ModuleType) -> None:
        with _substitutes():
            exec_module(module)

    return execute


@contextmanager
def _substitutes() -> Iterator[None]:
    """Replace the two functions that the libraries need, unless the compiler is imported already."""
    if _COMPILER in sys.modules:
        yield
        return
    from torch import compiler  # noqa: PLC0415 - the libraries import PyTorch anyway

    disable = compiler.disable
    compiler.disable = functools.partial(_deferred, disable)
    sys.modules[_UTILITIES] = _Utilities(_UTILITIES)
    try:
        yield
    finally:
        compiler.disable = disable
        _remove_substitute()


class _Utilities(ModuleType):
    """Has the attributes of the module of the same name, which it imports for all but one of them."""

    def is_compile_supported(self, device_type: str) -> bool:
        found: bool = _import_utilities().is_compile_supported(device_type)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for such attributes
            raise AttributeError(name)
        return getattr(_import_utilities(), name)


def _import_utilities() -> ModuleType:
    _remove_substitute()
    return importlib.import_module(_UTILITIES)


def _remove_substitute() -> None:
    if isinstance(sys.modules.get(_UTILITIES), _Utilities):
        del sys.modules[_UTILITIES]


def _deferred(
    disable: Callable[..., Any], fn: Callable[..., Any] | None = None, *arguments: Any, **options: Any
) -> Any:
    """Do what `torch.compiler.disable` does, for a function when it is called for the first time."""
    if fn is None or isinstance(fn, type):
        return disable(fn, *arguments, **options)

    @functools.cache
    def disabled() -> Callable[..., Any]:
        result: Callable[..., Any] = disable(fn, *arguments, **options)
        return result

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled()(*args, **kwargs)

    return call
