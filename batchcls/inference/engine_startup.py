"""Start an engine and hold it against its bundle's golden answers. Needs torch for what must be built only."""

from typing import TYPE_CHECKING

from batchcls.inference.golden_test import GOLDEN_IMAGES_VERSION, predict_golden_images
from batchcls.models.engines.engine import Engine, EngineChoice, EngineConfig
from batchcls.models.engines.factory import start_engine
from batchcls.models.golden import Deviation, check_golden
from batchcls.models.model_bundle import Bundle, BundleConfig

if TYPE_CHECKING:
    from batchcls.models.backbone import Backbone


def start_tested_engine(
    bundle: Bundle, choice: EngineChoice, place: EngineConfig
) -> tuple[Engine, Deviation]:
    """Put the bundle's network on the device, tested against its golden answers.

    Whatever the choice, a network that is built is tested in fp32 on the same device before an
    engine gets it; then the engine is tested with the tolerance of its precision. So a wrong mean
    does not hide behind rounding. A conversion of an earlier start was made of a tested network.

    Returns:
        The engine, and how far its answers are from the golden ones.

    Raises:
        InputError: the bundle does not hold together, or the engine, device or precision is not there.
        GoldenMismatch: the network does not answer as the bundle says.
    """
    engine = start_engine(bundle, choice, place, lambda: _tested_backbone(bundle, place))
    return engine, self_test(bundle.config, engine)


def _tested_backbone(bundle: Bundle, place: EngineConfig) -> "Backbone":
    # The libraries of architectures take seconds to import; a converted network needs none of them.
    from batchcls.inference.golden_record import tested_backbone  # noqa: PLC0415

    return tested_backbone(bundle, place)


def self_test(config: BundleConfig, engine: Engine) -> Deviation:
    """Hold a running engine against the golden answers of its bundle.

    Returns:
        How far off the engine is, within the tolerance of its precision.

    Raises:
        GoldenMismatch: it is further off, or the bundle has no golden answers of these drawings.
    """
    golden = config.require_golden(GOLDEN_IMAGES_VERSION)
    found = predict_golden_images(config.preprocessing, engine)
    return check_golden(golden, found.probabilities, found.embedding, config.labels, engine.precision)
