"""A bundle becomes a program of OpenVINO, by way of two conversions that a node keeps.

The *network* is OpenVINO's own file of it, in float32 or quantized to int8: N,3,H,W normalized images
in, logits and embedding out. The *program* is the network with the normalization in front, for one dtype
of pixels and one arithmetic, compiled for this kind of processor; reading it takes a fraction
of a second. Needs torch only where a network is converted.
"""

import hashlib
import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino.preprocess import PrePostProcessor

from batchcls.errors import InputError
from batchcls.hardware import Hardware
from batchcls.models.engines.engine import EngineChoice, EngineConfig
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing

MOST_IMAGES = 300
"""Of more images only so many are used: each costs a pass of the network in float32 and more."""


def quantize(
    network: openvino.Model, pixels: NDArray[np.uint8], preprocessing: Preprocessing
) -> openvino.Model:
    """Quantize weights and activations.

    Args:
        network: N,3,H,W normalized images -> logits and embedding, in float32.
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

    def normalized(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled = (image[None].astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)

    with _quiet_nncf() as nncf:
        model: openvino.Model = nncf.quantize(
            network, nncf.Dataset(list(taken), normalized), subset_size=len(taken)
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


if TYPE_CHECKING:  # a network that is compiled already needs no PyTorch
    from batchcls.models.backbone import Backbone

PixelType = Literal["uint8", "float32"]

_FORMAT = "1"
"""Goes up when the same bundle is converted in another way."""

_NETWORK, _PROGRAM = "network.xml", "program.blob"
_ELEMENTS: Mapping[PixelType, openvino.Type] = {"uint8": openvino.Type.u8, "float32": openvino.Type.f32}

_HINTS: Mapping[str, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}


@dataclass(frozen=True, slots=True)
class Converter:
    """What is needed to give a bundle to OpenVINO on this machine; see `start.start_engine`."""

    core: openvino.Core
    bundle: Bundle
    choice: EngineChoice
    place: EngineConfig
    backbone: "Callable[[], Backbone]"

    def programs(self, pixels: PixelType) -> list[openvino.CompiledModel]:
        """The network, ready to run on N,H,W,3 pixels: uint8, or float32 that is normalized already.

        It is one program with a stream a thread, which share the weights; in int8 as many programs
        as threads. With two and more streams in one program OpenVINO 2026.4 answers wrongly for
        squeezenet1_1 in int8, always, on any image (docs/measurements).

        Raises:
            InputError: the network cannot be converted, there is nothing to quantize it by, or the
                conversions' folder cannot be written to.
        """
        family = self._network_key()
        key = {
            **family,
            "name": f"{family['name']}-{self.choice.precision}-{pixels}",
            "pixels": pixels,
            "arithmetic": _HINTS[self.choice.precision],
        }
        folder = self.place.compile_cache.get(key, lambda folder: self._compile(pixels, folder))
        blob = (folder / _PROGRAM).read_bytes()
        threads = self.place.threads
        count, streams = (threads, 1) if self.choice.precision == "int8" else (1, threads)
        return [self.core.import_model(blob, "CPU", self._properties(streams)) for _ in range(count)]

    def _properties(self, streams: int) -> dict[str, Any]:
        # A stream a thread gives the most images a second (docs/measurements): threads that share a
        # layer wait for each other. Pinned threads of several actors would share the same cores.
        return {
            "INFERENCE_PRECISION_HINT": _HINTS[self.choice.precision],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams,
            "ENABLE_CPU_PINNING": False,
        }

    def _compile(self, pixels: PixelType, folder: Path) -> None:
        model = _with_normalization(self.core.read_model(self._network() / _NETWORK), self.bundle, pixels)
        compiled = self.core.compile_model(model, "CPU", self._properties(streams=1))
        (folder / _PROGRAM).write_bytes(compiled.export_model().getvalue())

    def _network(self) -> Path:
        """The folder of the network; fp32 and bf16 share one."""
        key = self._network_key()
        make = self._quantize if self.choice.precision == "int8" else self._convert
        return self.place.compile_cache.get(key, make)

    def _network_key(self) -> dict[str, str]:
        hardware = Hardware.detect()
        key = {
            "name": f"openvino-{self.bundle.config.architecture}",
            "format": _FORMAT,
            "bundle": self.bundle.fingerprint,
            "openvino": openvino.__version__,
            "processor": " ".join([hardware.processor, *hardware.features]),
            "network": "float32",
        }
        if self.choice.precision == "int8":
            key |= {"network": "int8", "nncf": _nncf_version(), "calibration": self._calibration_identity()}
        return key

    def _calibration_identity(self) -> str:
        """Which images the scales are taken from, where whoever gives them says so."""
        return hashlib.sha256(str(getattr(self.place.calibration, "identity", "")).encode()).hexdigest()

    def _convert(self, folder: Path) -> None:
        from batchcls.models.engines.openvino_trace import trace  # noqa: PLC0415 - torch takes seconds

        model = trace(self.backbone(), self.bundle.config.preprocessing)
        openvino.save_model(model, folder / _NETWORK, compress_to_fp16=False)

    def _quantize(self, folder: Path) -> None:
        from batchcls.models.engines.openvino_convert import quantize  # noqa: PLC0415 - nncf takes seconds

        if self.place.calibration is None:
            raise InputError(
                "--precision int8: there are no images to choose its scales by; name a manifest, or use "
                "--precision bf16"
            )
        plain = Converter(self.core, self.bundle, EngineChoice("openvino", "fp32"), self.place, self.backbone)
        network = self.core.read_model(plain._network() / _NETWORK)
        model = quantize(network, self.place.calibration(), self.bundle.config.preprocessing)
        openvino.save_model(model, folder / _NETWORK, compress_to_fp16=False)


def _with_normalization(model: openvino.Model, bundle: Bundle, pixels: PixelType) -> openvino.Model:
    """N,3,H,W normalized in front of N,H,W,3 pixels; what is normalized already is only turned."""
    steps = PrePostProcessor(model)
    images = steps.input(0)
    images.tensor().set_element_type(_ELEMENTS[pixels]).set_layout(openvino.Layout("NHWC"))
    images.model().set_layout(openvino.Layout("NCHW"))
    if pixels == "uint8":
        preprocessing = bundle.config.preprocessing
        normalize = images.preprocess().convert_element_type(openvino.Type.f32)
        normalize.mean([255 * value for value in preprocessing.mean])
        normalize.scale([255 * value for value in preprocessing.std])
    return steps.build()


def _nncf_version() -> str:
    try:
        return version("nncf")
    except PackageNotFoundError:
        raise InputError(
            "--precision int8: the package nncf is missing; pip install 'batchcls[openvino]'"
        ) from None
