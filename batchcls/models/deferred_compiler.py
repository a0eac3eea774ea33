"""Imports torchvision and timm without the compiler of PyTorch, which batchcls needs only for the engine `compile`.

Both libraries import `torch._dynamo` when they are imported: torchvision for one function that its RoI align operator
calls, timm to apply `torch.compiler.disable` to one method. That is a third of the CPU time in which a process of a
job starts (docs/measurements/startup.md). While they are imported, a module takes its place that imports the real one
when something in it is used.

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

_COMPILER = "torch._dynamo"
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
        if fullname not in _LIBRARIES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _without_compiler(spec.loader.exec_module)  # type: ignore[assignment]
        return spec


def _without_compiler(exec_module: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def execute(module: ModuleType) -> None:
        with _compiler_deferred():
            exec_module(module)

    return execute


@contextmanager
def _compiler_deferred() -> Iterator[None]:
    """Put modules that import the compiler on first use in its place, unless it is imported already."""
    if _COMPILER in sys.modules:
        yield
        return
    package = _DeferredModule(_COMPILER)
    package.disable = _disable
    utils = _DeferredModule(f"{_COMPILER}.utils")
    utils.is_compile_supported = _is_compile_supported
    deferred = {module.__name__: module for module in (package, utils)}
    sys.modules.update(deferred)
    try:
        yield
    finally:
        for name, module in deferred.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _DeferredModule(ModuleType):
    """Has the attributes of the module of the same name, which it imports for them."""

    __path__: list[str] = []  # noqa: RUF012 - a package, as the import system asks
    disable: Callable[..., Any]
    is_compile_supported: Callable[[str], bool]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for such attributes
            raise AttributeError(name)
        return getattr(_import_compiler(self.__name__), name)


def _import_compiler(name: str) -> ModuleType:
    """Import a module of the compiler, also while a library is imported."""
    if isinstance(sys.modules.get(_COMPILER), _DeferredModule):
        for module in (_COMPILER, f"{_COMPILER}.utils"):
            del sys.modules[module]
    return importlib.import_module(name)


def _is_compile_supported(device_type: str) -> bool:
    found: bool = _import_compiler(f"{_COMPILER}.utils").is_compile_supported(device_type)
    return found


def _disable(fn: Callable[..., Any] | None = None, *arguments: Any, **options: Any) -> Any:
    """Do what `torch._dynamo.disable` does, for a function when it is called for the first time."""
    if fn is None or isinstance(fn, type):
        return _import_compiler(_COMPILER).disable(fn, *arguments, **options)

    @functools.cache
    def disabled() -> Callable[..., Any]:
        result: Callable[..., Any] = _import_compiler(_COMPILER).disable(fn, *arguments, **options)
        return result

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled()(*args, **kwargs)

    return call
