"""The golden images: a few drawn images for which every bundle contains the expected outputs of its network.

The images pass through the preprocessing of the bundle and through the engine, so that both are tested.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from batchcls.images.transform import Transform
from batchcls.inference.postprocess import AveragedOutput, average
from batchcls.models.engines.engine import Engine
from batchcls.preprocessing import Preprocessing

GOLDEN_IMAGES_VERSION = 1
"""Version of the golden images; increase it with every change of `golden_images`."""

# Wide, tall, square and small, so that the resize shrinks, enlarges and crops in both directions.
_SIZES = ((240, 320), (400, 300), (256, 256), (90, 150))


def golden_images() -> Iterator[npt.NDArray[np.uint8]]:
    """Yield four images, H x W x 3 uint8, with colors, edges and texture.

    They are drawn with integer arithmetic, which gives the same pixels on every machine.
    """
    for index, (height, width) in enumerate(_SIZES):
        rows, columns = np.mgrid[0:height, 0:width]
        checks = (rows // (9 + 5 * index) + columns // (13 + 3 * index)) % 2
        disc = (rows - height // 2) ** 2 + (columns - width // 3) ** 2 < (min(height, width) // 4) ** 2
        texture = ((rows * 73_856_093) ^ (columns * 19_349_663) ^ (index * 83_492_791)) >> 7 & 31
        red = rows * 200 // height + 40 * checks
        green = np.where(disc, 220 - 50 * index, columns * 140 // width)
        blue = 60 * index + 90 * (1 - checks) * ~disc
        image = np.stack([red, green, blue], axis=2) + texture[..., None]
        yield image.clip(0, 255).astype(np.uint8)


def predict_golden_images(preprocessing: Preprocessing, engine: Engine) -> AveragedOutput:
    """Return the probabilities and embeddings of the golden images."""
    return average(engine.predict(golden_pixels(preprocessing)), views=1, l2_normalize=False)


def golden_pixels(preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Return the golden images as input of the network, N x H x W x 3."""
    transform = Transform(preprocessing)
    return np.stack([transform(image) for image in golden_images()])
