"""Ask a running network about the drawn images, to make golden answers or to hold it against them.

The images go the whole way: resize and crop as the bundle's preprocessing says, then the engine.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from batchcls.images.transform import Transform
from batchcls.inference.average import Averaged, average
from batchcls.models.bundle import Bundle, BundleConfig, build_backbone
from batchcls.models.engines import Engine
from batchcls.models.engines.start import start_engine
from batchcls.models.export import Program
from batchcls.models.golden import Deviation, check, record
from batchcls.preprocessing import Preprocessing

DRAWING = 1
"""Version of the drawn images; goes up when `draw_images` draws anything else."""

REFERENCE_PRECISION = "fp32"

# Wide, tall, square and small: the resize has to shrink, to enlarge, and to crop both ways.
_SIZES = ((240, 320), (400, 300), (256, 256), (90, 150))


def with_golden(bundle: Bundle) -> Bundle:
    """The bundle with the golden answers of its own network, in float32 on this machine's CPU.

    Raises:
        InputError: the bundle does not hold together.
    """
    preprocessing = bundle.config.preprocessing
    threads = torch.get_num_threads()
    engine = start_engine(build_backbone(bundle), preprocessing, "cpu", REFERENCE_PRECISION, threads)
    found = _ask(preprocessing, engine)
    golden = record(found.probabilities, found.embedding, bundle.config.labels, DRAWING)
    return replace(bundle, config=bundle.config.model_copy(update={"golden": golden}))


def start_tested_engine(
    bundle: Bundle, device: str, precision: str, threads: int
) -> tuple[Engine, Deviation]:
    """Build the bundle's network and put it on the device, tested against its golden answers.

    A precision that loses something is given its own tolerance, after the network has passed in
    fp32 on the same device: so a wrong mean does not hide behind rounding.

    Returns:
        The engine, and how far its answers are from the golden ones.

    Raises:
        InputError: the bundle does not hold together, or the device or precision is not there.
        GoldenMismatch: the network does not answer as the bundle says.
    """
    config = bundle.config
    backbone = build_backbone(bundle)
    reference = start_engine(backbone, config.preprocessing, device, REFERENCE_PRECISION, threads)
    found = self_test(config, reference)
    engine = start_engine(backbone, config.preprocessing, device, precision, threads)
    if engine.precision != REFERENCE_PRECISION:
        found = self_test(config, engine)
    return engine, found


def self_test(config: BundleConfig, engine: Engine) -> Deviation:
    """Hold a running engine against the golden answers of its bundle.

    Returns:
        How far off the engine is, within the tolerance of its precision.

    Raises:
        GoldenMismatch: it is further off, or the bundle has no golden answers of these drawings.
    """
    golden = config.require_golden(DRAWING)
    found = _ask(config.preprocessing, engine)
    return check(golden, found.probabilities, found.embedding, config.labels, engine.precision)


def check_program(config: BundleConfig, program: Program) -> Deviation:
    """Hold an exported program against the golden answers of its bundle, as `self_test` does an engine.

    Raises:
        GoldenMismatch: the program answers otherwise.
    """
    golden = config.require_golden(DRAWING)
    found = average(program(_pixels(config.preprocessing)), views=1, l2_normalize=False)
    return check(golden, found.probabilities, found.embedding, config.labels, REFERENCE_PRECISION)


def draw_images() -> Iterator[npt.NDArray[np.uint8]]:
    """Four pictures, H x W x 3 uint8: colours, edges and texture in integers, the same on every machine."""
    for index, (height, width) in enumerate(_SIZES):
        rows, columns = np.mgrid[0:height, 0:width]
        checks = (rows // (9 + 5 * index) + columns // (13 + 3 * index)) % 2
        disc = (rows - height // 2) ** 2 + (columns - width // 3) ** 2 < (min(height, width) // 4) ** 2
        texture = ((rows * 73_856_093) ^ (columns * 19_349_663) ^ (index * 83_492_791)) >> 7 & 31
        red = rows * 200 // height + 40 * checks
        green = np.where(disc, 220 - 50 * index, columns * 140 // width)
        blue = 60 * index + 90 * (1 - checks) * ~disc
        picture = np.stack([red, green, blue], axis=2) + texture[..., None]
        yield picture.clip(0, 255).astype(np.uint8)


def _ask(preprocessing: Preprocessing, engine: Engine) -> Averaged:
    return average(engine.answer(_pixels(preprocessing)), views=1, l2_normalize=False)


def _pixels(preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """The drawn images as the network's input, N x H x W x 3."""
    transform = Transform(preprocessing)
    return np.stack([transform(torch.from_numpy(image).permute(2, 0, 1)) for image in draw_images()])
