"""Measurement of the scale at which JPEGs may be decoded without a loss of accuracy.

An image decoded at a reduced scale lacks some detail of the full image, and networks differ in their sensitivity to
that. Photographs of ImageNet, enlarged until a margin just allows half the scale, kept 96% of the best classes of
mobilenetv2_100 with a margin of 2, and 98% of those of squeezenet1_1 with a margin of 4 (docs/measurements).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from batchcls.images.decode import reduction_factor
from batchcls.images.transform import Transform
from batchcls.inference.agreement import EngineAgreement
from batchcls.inference.engine_record import EngineSelectionRecord, MarginResult, ScaledDecode
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.throughput import predict_all
from batchcls.models.engines.engine import REFERENCE, Engine, EngineConfig
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing

MARGINS = (1.5, 2.0, 3.0, 4.0)
"""Measured margins: the minimum ratio of the height and width of a decoded image to what the resize needs."""

_MAX_IMAGES = 256
_MIN_IMAGES = 50  # one changed class of 50 is 2%, which already violates the default tolerance

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class DecodedSample:
    """Sampled images in the preprocessing of a network, and a function that decodes them at a reduced scale.

    Attributes:
        full: N,H,W,3 uint8, decoded at full scale.
        sizes: N x 2, height and width of the stored images.
        decode_scaled: returns the images as `full`, decoded with a margin.
    """

    full: Pixels
    sizes: npt.NDArray[np.int32]
    decode_scaled: Callable[[float], Pixels]


def scaled_images(
    sizes: npt.NDArray[np.int32], preprocessing: Preprocessing, margin: float
) -> npt.NDArray[np.bool_]:
    """Return for N x 2 heights and widths which of the images are decoded at a reduced scale with a margin.

    EXIF orientation is ignored. It only matters for images whose sides are not divisible by the factor.
    """
    min_size = Transform(preprocessing).min_decoded_size(margin)
    return np.array(
        [reduction_factor((height, width), min_size(height, width)) > 1 for height, width in sizes.tolist()],
        bool,
    )


def measure_scaled_decode(
    bundle: Bundle, selection: EngineSelectionRecord, config: EngineConfig, sample: DecodedSample
) -> ScaledDecode:
    """Find the smallest margin with which the selected engine is within the accuracy tolerance.

    The errors of the engine and of the scale are measured together: scaled images in the selected engine are compared
    with full images in fp32.

    Args:
        bundle: the model.
        selection: the engine that was selected for this node.
        config: device and resources of the engines.
        sample: images of the catalog.
    """
    preprocessing = bundle.config.preprocessing
    results: list[MarginResult] = []
    engines: tuple[Engine, Engine] | None = None
    for margin in MARGINS:
        indices = np.flatnonzero(scaled_images(sample.sizes, preprocessing, margin))[:_MAX_IMAGES]
        if len(indices) < _MIN_IMAGES:
            reason = (
                f"{len(indices)} of {len(sample.sizes)} images are large enough for a margin of {margin:g}"
            )
            return _full_scale(results, reason)
        reference, engine = engines = engines or _start_engines(bundle, selection, config)
        scaled = sample.decode_scaled(margin)
        if len(scaled) != len(sample.full):  # fetching failed for some, so that indices do not match
            return _full_scale(results, "not all images could be read a second time")
        expected = predict_all(reference, sample.full[indices], config.batch_size)
        output = predict_all(engine, scaled[indices], config.batch_size)
        agreement = EngineAgreement.between(output, expected)
        violation = agreement.violation(selection.request.tolerance, selection.precision)
        results.append(_margin_result(margin, agreement, violation))
        if violation is None:
            return ScaledDecode(margin=margin, results=tuple(results), note=None)
    return _full_scale(results, f"{results[-1].rejected} (margin {MARGINS[-1]:g})")


def _full_scale(results: list[MarginResult], reason: str) -> ScaledDecode:
    note = f"JPEGs are decoded at full scale: {reason}"
    return ScaledDecode(margin=None, results=tuple(results), note=note)


def _start_engines(
    bundle: Bundle, selection: EngineSelectionRecord, config: EngineConfig
) -> tuple[Engine, Engine]:
    """Start the selected engine in fp32, and in the selected precision; both are the same if that is fp32."""
    fp32 = replace(selection.choice, precision=REFERENCE.precision)
    reference, _ = start_tested_engine(bundle, fp32, config)
    if fp32 == selection.choice:
        return reference, reference
    engine, _ = start_tested_engine(bundle, selection.choice, config)
    return reference, engine


def _margin_result(margin: float, agreement: EngineAgreement, violation: str | None) -> MarginResult:
    return MarginResult(
        margin=margin,
        images=agreement.images,
        top1_agreement=agreement.top1_agreement,
        mean_cosine=agreement.mean_cosine,
        rejected=violation,
    )
