"""Converts a bundle to a program of OpenVINO, through two kinds of entries in the compile cache.

The *network* is OpenVINO's file format of the model, in float32 or quantized to int8: N,3,H,W normalized images ->
logits and embedding. The *program* is the network after a normalization step, for one dtype of the pixels and one
precision, compiled for this kind of processor; loading it takes a fraction of a second. PyTorch is required only to
convert a network.
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

if TYPE_CHECKING:  # a network in the compile cache does not require PyTorch
    from batchcls.models.backbone import Backbone

PixelType = Literal["uint8", "float32"]

_FORMAT = "1"
"""Part of the cache key; increment it when the same bundle is converted differently."""

_NETWORK_FILE, _PROGRAM_FILE = "network.xml", "program.blob"
_ELEMENT_TYPES: Mapping[PixelType, openvino.Type] = {
    "uint8": openvino.Type.u8,
    "float32": openvino.Type.f32,
}

_PRECISION_HINTS: Mapping[str, str] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "f32"}

_MAX_CALIBRATION_IMAGES = 300
"""Each calibration image costs at least one forward pass in float32."""


@dataclass(frozen=True, slots=True)
class Converter:
    """Converts a bundle for OpenVINO on this machine; the attributes are those of `factory.start_engine`."""

    core: openvino.Core
    bundle: Bundle
    choice: EngineChoice
    config: EngineConfig
    backbone: "Callable[[], Backbone]"

    def load_programs(self, pixels: PixelType) -> list[openvino.CompiledModel]:
        """Load the network as programs for N,H,W,3 pixels: uint8, or float32 that is already normalized.

        The result is one program with one stream per thread, which share the weights. In int8 it is one program per
        thread, because with two or more streams in one program OpenVINO 2026.4 returns wrong outputs for
        squeezenet1_1 in int8, reproducibly and for every image (docs/measurements).

        Raises:
            InputError: the network cannot be converted, there are no calibration images, or the compile cache cannot
                be written to.
        """
        network_key = self._network_key()
        key = {
            **network_key,
            "name": f"{network_key['name']}-{self.choice.precision}-{pixels}",
            "pixels": pixels,
            "arithmetic": _PRECISION_HINTS[self.choice.precision],
        }
        folder = self.config.compile_cache.get(key, lambda folder: self._compile(pixels, folder))
        blob = (folder / _PROGRAM_FILE).read_bytes()
        threads = self.config.threads
        count, streams = (threads, 1) if self.choice.precision == "int8" else (1, threads)
        return [self.core.import_model(blob, "CPU", self._properties(streams)) for _ in range(count)]

    def _properties(self, streams: int) -> dict[str, Any]:
        # One stream per thread gives the highest throughput (docs/measurements), because threads that share a layer
        # wait for each other. Pinned threads of several actors would share the same cores.
        return {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINTS[self.choice.precision],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": streams,
            "ENABLE_CPU_PINNING": False,
        }

    def _compile(self, pixels: PixelType, folder: Path) -> None:
        network = self.core.read_model(self._network_folder() / _NETWORK_FILE)
        model = _add_normalization(network, self.bundle, pixels)
        compiled = self.core.compile_model(model, "CPU", self._properties(streams=1))
        (folder / _PROGRAM_FILE).write_bytes(compiled.export_model().getvalue())

    def _network_folder(self) -> Path:
        """Return the cache entry of the network, which all precisions except int8 share."""
        create = self._quantize if self.choice.precision == "int8" else self._convert
        return self.config.compile_cache.get(self._network_key(), create)

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
            key |= {"network": "int8", "nncf": _nncf_version(), "calibration": self._calibration_digest()}
        return key

    def _calibration_digest(self) -> str:
        """Return a digest of the calibration function's `identity`, which names its images, if it has one."""
        return hashlib.sha256(str(getattr(self.config.calibration, "identity", "")).encode()).hexdigest()

    def _convert(self, folder: Path) -> None:
        from batchcls.models.engines.openvino_trace import trace  # noqa: PLC0415 - torch takes seconds

        model = trace(self.backbone(), self.bundle.config.preprocessing)
        openvino.save_model(model, folder / _NETWORK_FILE, compress_to_fp16=False)

    def _quantize(self, folder: Path) -> None:
        if self.config.calibration is None:
            raise InputError(
                "--precision int8: there are no calibration images; name a manifest, or use --precision bf16"
            )
        fp32 = EngineChoice("openvino", "fp32")
        converter = Converter(self.core, self.bundle, fp32, self.config, self.backbone)
        network = self.core.read_model(converter._network_folder() / _NETWORK_FILE)
        model = quantize(network, self.config.calibration(), self.bundle.config.preprocessing)
        openvino.save_model(model, folder / _NETWORK_FILE, compress_to_fp16=False)


def quantize(
    network: openvino.Model, pixels: NDArray[np.uint8], preprocessing: Preprocessing
) -> openvino.Model:
    """Quantize weights and activations to int8.

    Args:
        network: N,3,H,W normalized images -> logits and embedding, in float32.
        pixels: N,H,W,3 calibration images after resizing and cropping.
        preprocessing: of the network's weights.

    Raises:
        InputError: there are no images.
    """
    if len(pixels) == 0:
        raise InputError(
            "--precision int8: none of the calibration images could be read; use --precision bf16"
        )
    mean, std = np.array(preprocessing.mean, np.float32), np.array(preprocessing.std, np.float32)
    # Evenly spaced, because manifests are often sorted by category.
    count = min(len(pixels), _MAX_CALIBRATION_IMAGES)
    sample = pixels[np.linspace(0, len(pixels) - 1, count).astype(int)]

    def normalize(image: NDArray[np.uint8]) -> NDArray[np.float32]:
        scaled = (image[None].astype(np.float32) / 255 - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)

    with _import_nncf_quietly() as nncf:
        model: openvino.Model = nncf.quantize(
            network, nncf.Dataset(list(sample), normalize), subset_size=len(sample)
        )
    return model


@contextmanager
def _import_nncf_quietly() -> Iterator[ModuleType]:
    """Import NNCF without progress bars, log lines and usage reports.

    NNCF decides when it is imported whether it sends usage reports; it does not if their package is missing.
    """
    telemetry = "openvino_telemetry"
    original = sys.modules.get(telemetry)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        sys.modules[telemetry] = None  # type: ignore[assignment]  # makes the import raise ImportError
        try:
            nncf = importlib.import_module("nncf")
        finally:
            del sys.modules[telemetry]
            if original is not None:
                sys.modules[telemetry] = original
        nncf.set_log_level(logging.ERROR)
        yield nncf


def _add_normalization(model: openvino.Model, bundle: Bundle, pixels: PixelType) -> openvino.Model:
    """Change the input from N,3,H,W normalized images to N,H,W,3 pixels; float32 pixels are only transposed."""
    steps = PrePostProcessor(model)
    images = steps.input(0)
    images.tensor().set_element_type(_ELEMENT_TYPES[pixels]).set_layout(openvino.Layout("NHWC"))
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
            "--precision int8 requires the package nncf: pip install 'batchcls[openvino]'"
        ) from None
