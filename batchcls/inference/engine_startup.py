"""Start an engine and test it with the golden outputs of its bundle. PyTorch is imported only to build a network."""

from typing import TYPE_CHECKING

from batchcls.inference.golden_test import GOLDEN_IMAGES_VERSION, predict_golden_images
from batchcls.models.engines.engine import Engine, EngineChoice, EngineConfig
from batchcls.models.engines.factory import start_engine
from batchcls.models.golden import Deviation, check_golden
from batchcls.models.model_bundle import Bundle, BundleConfig

if TYPE_CHECKING:
    from batchcls.models.backbone import Backbone


def start_tested_engine(
    bundle: Bundle, choice: EngineChoice, config: EngineConfig
) -> tuple[Engine, Deviation]:
    """Start an engine with the network of a bundle, and test it with the golden outputs of the bundle.

    A network that has to be built is first tested in fp32 on the same device, whatever the choice, so that the larger
    tolerance of another precision does not hide an error such as a wrong mean. Then the engine is tested with the
    tolerance of its precision. A network from the compile cache was tested before it was compiled.

    Returns:
        The engine, and the deviation of its outputs from the golden ones.

    Raises:
        InputError: the bundle is inconsistent, or the engine, device or precision is not available.
        GoldenMismatch: the network or the engine does not reproduce the golden outputs.
    """
    engine = start_engine(bundle, choice, config, lambda: _tested_backbone(bundle, config))
    return engine, self_test(bundle.config, engine)


def _tested_backbone(bundle: Bundle, config: EngineConfig) -> "Backbone":
    # The libraries of architectures take seconds to import, and a compiled network does not need them.
    from batchcls.inference.golden_record import tested_backbone  # noqa: PLC0415

    return tested_backbone(bundle, config)


def self_test(config: BundleConfig, engine: Engine) -> Deviation:
    """Compare the outputs of an engine with the golden outputs of its bundle.

    Returns:
        The deviation of the engine, which is within the tolerance of its precision.

    Raises:
        GoldenMismatch: the deviation exceeds the tolerance, or the bundle has no golden outputs for this version of
            the golden images.
    """
    golden = config.require_golden(GOLDEN_IMAGES_VERSION)
    found = predict_golden_images(config.preprocessing, engine)
    return check_golden(golden, found.probabilities, found.embedding, config.labels, engine.precision)
