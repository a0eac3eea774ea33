"""A network of OpenVINO in int8, its scales chosen by images of the catalog (NNCF)."""

import importlib
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import ModuleType

import numpy as np
import openvino
from numpy.typing import NDArray

from batchcls.errors import InputError
from batchcls.preprocessing import Preprocessing

MOST_IMAGES = 300
"""Of more images only so many are used: each costs a pass of the network in float32 and more."""


def quantise(
    network: openvino.Model, pixels: NDArray[np.uint8], preprocessing: Preprocessing
) -> openvino.Model:
    """Quantise weights and activations.

    Args:
        network: N,3,H,W normalised images -> logits and embedding, in float32.
        pixels: N,H,W,3 images as the network will see them.
        preprocessing: of the network's weights.

    Raises:
        InputError: there is no image.
    """
    if len(pixels) == 0:
        raise InputError(
            "--precision int8: none of the images to choose its scales by could be read; use --precision bf16"
        )
    mean, std = np.array(preprocessing.mean, np.float32), np.array(preprocessing.std, np.float32)
    # Spread over all of them, since a manifest is often sorted by category.
    taken = pixels[np.linspace(0, len(pixels) - 1, min(len(pixels), MOST_IMAGES)).astype(int)]

    def normalised(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled = (image[None].astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)

    with _quiet_nncf() as nncf:
        model: openvino.Model = nncf.quantize(
            network, nncf.Dataset(list(taken), normalised), subset_size=len(taken)
        )
    return model


@contextmanager
def _quiet_nncf() -> Iterator[ModuleType]:
    """The package, without its bars and notes, and without its reports to its maker over the network.

    It decides about those when it is imported, and makes none where their package is missing.
    """
    reporter = "openvino_telemetry"
    before = sys.modules.get(reporter)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        sys.modules[reporter] = None  # type: ignore[assignment]  # Python's own way to say that it is missing
        try:
            nncf = importlib.import_module("nncf")
        finally:
            del sys.modules[reporter]
            if before is not None:
                sys.modules[reporter] = before
        nncf.set_log_level(logging.ERROR)
        yield nncf
