"""Creation of a running engine from a bundle and an engine choice; the only module that knows all engines."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from batchcls.errors import InputError
from batchcls.models.engines.engine import Engine, EngineChoice, EngineConfig, EngineName
from batchcls.models.model_bundle import Bundle

if TYPE_CHECKING:  # an engine whose network is in the compile cache does not require PyTorch
    from batchcls.models.backbone import Backbone


class EngineModule(Protocol):
    """The interface of an engine's module."""

    def start(
        self, bundle: Bundle, choice: EngineChoice, config: EngineConfig, backbone: "Callable[[], Backbone]"
    ) -> Engine:
        """See `start_engine`."""


def _import_torch_eager() -> EngineModule:
    from batchcls.models.engines import torch_eager  # noqa: PLC0415

    return torch_eager


def _import_torch_compile() -> EngineModule:
    from batchcls.models.engines import torch_compile  # noqa: PLC0415

    return torch_compile


def _import_openvino() -> EngineModule:
    from batchcls.models.engines import openvino_engine  # noqa: PLC0415

    return openvino_engine


@dataclass(frozen=True, slots=True)
class _Registration:
    """How an engine's module is imported, the package that it requires, and the extra that installs the package."""

    import_module: Callable[[], EngineModule]
    package: str
    extra: str | None = None


# Modules are imported when their engine starts, because their runtimes take seconds to import.
_ENGINES: Mapping[EngineName, _Registration] = {
    "torch": _Registration(_import_torch_eager, "torch"),
    "compile": _Registration(_import_torch_compile, "torch"),
    "openvino": _Registration(_import_openvino, "openvino", "openvino"),
}


def missing_package(engine: EngineName) -> str | None:
    """Return which package of an engine is not installed and how to install it; None if none is missing."""
    registration = _ENGINES[engine]
    if importlib.util.find_spec(registration.package) is not None:
        return None
    return f"{engine} needs the package {registration.package}: pip install 'batchcls[{registration.extra}]'"


def start_engine(
    bundle: Bundle,
    choice: EngineChoice,
    config: EngineConfig,
    backbone: "Callable[[], Backbone] | None" = None,
) -> Engine:
    """Load a bundle's network on a device.

    Args:
        bundle: the model.
        choice: the engine and its precision.
        config: device, threads, batch size and compile cache.
        backbone: builds the network; not called if the compile cache contains it. None: `build.build_backbone`.

    Raises:
        InputError: the engine is not installed, does not support the choice on this machine, or the bundle is
            inconsistent.
    """
    problem = missing_package(choice.engine)
    if problem is not None:
        raise InputError(f"--engine {choice.engine}: {problem}")
    module = _ENGINES[choice.engine].import_module()
    return module.start(bundle, choice, config, backbone or (lambda: _build(bundle)))


def _build(bundle: Bundle) -> "Backbone":
    from batchcls.models.build import build_backbone  # noqa: PLC0415 - imports PyTorch, which takes seconds

    return build_backbone(bundle)


def describe_engine(engine: Engine) -> str:
    """Return the description of an engine, for example `torch bf16 on cpu`."""
    return f"{engine.name} {engine.precision} on {engine.device}"
