"""How far JPEGs may be reduced in decoding before a network answers otherwise: measured, as engines are.

A reduced image lacks a little of what the whole one shows, and networks differ in what they make of
that. Photographs of ImageNet enlarged until half the scale just fits kept, with a margin of 2, the best
class of 96 % for mobilenetv2_100, and with 4 that of 98 % for squeezenet1_1 (docs/measurements).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from batchcls.images.decode import reduction_factor
from batchcls.images.transform import Transform
from batchcls.inference.agreement import EngineAgreement
from batchcls.inference.engine_record import EngineSelectionRecord, MarginResult, ReducedScale
from batchcls.inference.engine_startup import start_tested_engine
from batchcls.inference.throughput import predict_all
from batchcls.models.engines.engine import REFERENCE, Engine, EngineConfig
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing

MARGINS = (1.5, 2.0, 3.0, 4.0)
"""What is tried: how many times as high and wide as the resize needs it an image must still be."""

_MOST_IMAGES = 256
_LEAST_IMAGES = 50  # of which one that changes is two in a hundred, more than the contract lets pass

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CalibrationPixels:
    """CalibrationPixels of the catalog in a network's preprocessing, and how to have them decoded otherwise.

    Attributes:
        whole: N,H,W,3 uint8, decoded whole.
        sizes: N x 2, height and width of the stored images.
        reduced: as `whole`, decoded with a margin.
    """

    whole: Pixels
    sizes: npt.NDArray[np.int32]
    reduced: Callable[[float], Pixels]


def reduced_by(
    sizes: npt.NDArray[np.int32], preprocessing: Preprocessing, margin: float
) -> npt.NDArray[np.bool_]:
    """Which of N images, of N x 2 heights and widths, a margin has decoded at a reduced scale.

    How an image is turned makes no difference but where its sides cannot be divided.
    """
    least = Transform(preprocessing).min_decoded_size(margin)
    return np.array(
        [reduction_factor((height, width), least(height, width)) > 1 for height, width in sizes.tolist()],
        bool,
    )


def measure_scaled_decode(
    bundle: Bundle, chosen: EngineSelectionRecord, place: EngineConfig, images: CalibrationPixels
) -> ReducedScale:
    """Find the smallest margin with which the chosen engine keeps the contract, on images of the catalog.

    The whole error is judged, that of the engine and that of the scale together: reduced images in
    the engine beside whole ones in fp32.

    Args:
        bundle: the model.
        chosen: the engine that was chosen for this node.
        place: where it runs.
        images: of the catalog.
    """
    preprocessing = bundle.config.preprocessing
    tried: list[MarginResult] = []
    engines: tuple[Engine, Engine] | None = None
    for margin in MARGINS:
        places = np.flatnonzero(reduced_by(images.sizes, preprocessing, margin))[:_MOST_IMAGES]
        if len(places) < _LEAST_IMAGES:
            few = f"{len(places)} of {len(images.sizes)} images are large enough for a margin of {margin:g}"
            return ReducedScale(margin=None, tried=tuple(tried), note=f"JPEGs are decoded whole: {few}")
        reference, engine = engines = engines or _start(bundle, chosen, place)
        reduced = images.reduced(margin)
        if len(reduced) != len(images.whole):  # a store that fails now and then: none is matched by guess
            note = "JPEGs are decoded whole: not all images could be read a second time"
            return ReducedScale(margin=None, tried=tuple(tried), note=note)
        expected = predict_all(reference, images.whole[places], place.batch_size)
        found = predict_all(engine, reduced[places], place.batch_size)
        agreement = EngineAgreement.between(found, expected)
        missed = agreement.missed(chosen.wanted.contract, chosen.precision)
        tried.append(_figures(margin, agreement, missed))
        if missed is None:
            return ReducedScale(margin=margin, tried=tuple(tried), note=None)
    note = f"JPEGs are decoded whole: {tried[-1].rejected} (margin {MARGINS[-1]:g})"
    return ReducedScale(margin=None, tried=tuple(tried), note=note)


def _start(bundle: Bundle, chosen: EngineSelectionRecord, place: EngineConfig) -> tuple[Engine, Engine]:
    """What answers in fp32, and what was chosen."""
    exact = replace(chosen.choice, precision=REFERENCE.precision)
    reference, _ = start_tested_engine(bundle, exact, place)
    if exact == chosen.choice:
        return reference, reference
    engine, _ = start_tested_engine(bundle, chosen.choice, place)
    return reference, engine


def _figures(margin: float, agreement: EngineAgreement, missed: str | None) -> MarginResult:
    return MarginResult(
        margin=margin,
        images=agreement.images,
        top1_agreement=agreement.top1_agreement,
        mean_cosine=agreement.mean_cosine,
        rejected=missed,
    )
