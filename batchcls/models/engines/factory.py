"""A bundle and a choice become a running engine: the one place that knows all engines."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from batchcls.errors import InputError
from batchcls.models.engines.engine import Engine, EngineChoice, EngineConfig, EngineName
from batchcls.models.model_bundle import Bundle

if TYPE_CHECKING:  # an engine whose network is converted already needs no torch
    from batchcls.models.backbone import Backbone


class EngineModule(Protocol):
    """What a module of this folder offers; importing it may import its runtime, which takes seconds."""

    def start(
        self, bundle: Bundle, choice: EngineChoice, place: EngineConfig, backbone: "Callable[[], Backbone]"
    ) -> Engine:
        """See `start_engine`."""


@dataclass(frozen=True, slots=True)
class _Known:
    """Where an engine lives, the package that it needs, and the extra that brings the package."""

    module: str
    package: str
    extra: str | None = None


_ENGINES: Mapping[EngineName, _Known] = {
    "torch": _Known("batchcls.models.engines.torch_eager", "torch"),
    "compile": _Known("batchcls.models.engines.torch_compile", "torch"),
    "openvino": _Known("batchcls.models.engines.openvino_engine", "openvino", "openvino"),
}


def missing(engine: EngineName) -> str | None:
    """Which package an engine lacks here and how to get it, in a few words; None if nothing is missing."""
    known = _ENGINES[engine]
    if importlib.util.find_spec(known.package) is not None:
        return None
    return f"{engine} needs the package {known.package}: pip install 'batchcls[{known.extra}]'"


def start_engine(
    bundle: Bundle,
    choice: EngineChoice,
    place: EngineConfig,
    backbone: "Callable[[], Backbone] | None" = None,
) -> Engine:
    """Put a bundle's network on a device.

    Args:
        bundle: the model.
        choice: what runs it.
        place: where.
        backbone: builds the network; called only if the engine has no conversion of it yet. None:
            `build.build_backbone`.

    Raises:
        InputError: the engine is not installed, cannot do that here, or the bundle does not hold together.
    """
    lacking = missing(choice.engine)
    if lacking is not None:
        raise InputError(f"--engine {choice.engine}: {lacking}")
    module = cast("EngineModule", importlib.import_module(_ENGINES[choice.engine].module))
    return module.start(bundle, choice, place, backbone or (lambda: _build(bundle)))


def _build(bundle: Bundle) -> "Backbone":
    from batchcls.models.build import build_backbone  # noqa: PLC0415 - torch takes seconds to import

    return build_backbone(bundle)


def describe(engine: Engine) -> str:
    """What an engine is, in a few words, as in `torch bf16 on cpu`."""
    return f"{engine.name} {engine.precision} on {engine.device}"
