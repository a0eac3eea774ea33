"""A bundle becomes a program of OpenVINO, by way of two conversions that a node keeps.

The *network* is OpenVINO's own file of it, in float32 or quantised to int8: N,3,H,W normalised images
in, logits and embedding out. The *program* is the network with the normalisation in front, for one dtype
of pixels and one arithmetic, compiled for this kind of processor; reading it takes a fraction
of a second. Needs torch only where a network is converted.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import openvino
from openvino.preprocess import PrePostProcessor

from batchcls.errors import InputError
from batchcls.hardware import Hardware
from batchcls.models.bundle import Bundle
from batchcls.models.engines import EngineChoice, EnginePlace

if TYPE_CHECKING:  # a network that is converted already needs no torch
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
    place: EnginePlace
    backbone: "Callable[[], Backbone]"

    def programs(self, pixels: PixelType) -> list[openvino.CompiledModel]:
        """The network, ready to run on N,H,W,3 pixels: uint8, or float32 that is normalised already.

        It is one program with a stream a thread, which share the weights; in int8 as many programs
        as threads. With two and more streams in one program OpenVINO 2026.4 answers wrongly for
        squeezenet1_1 in int8, always, on any image (docs/measurements).

        Raises:
            InputError: the network cannot be converted, there is nothing to quantise it by, or the
                conversions' folder cannot be written to.
        """
        family = self._network_key()
        key = {
            **family,
            "name": f"{family['name']}-{self.choice.precision}-{pixels}",
            "pixels": pixels,
            "arithmetic": _HINTS[self.choice.precision],
        }
        folder = self.place.conversions.get(key, lambda folder: self._compile(pixels, folder))
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
        model = _with_normalisation(self.core.read_model(self._network() / _NETWORK), self.bundle, pixels)
        compiled = self.core.compile_model(model, "CPU", self._properties(streams=1))
        (folder / _PROGRAM).write_bytes(compiled.export_model().getvalue())

    def _network(self) -> Path:
        """The folder of the network; fp32 and bf16 share one."""
        key = self._network_key()
        make = self._quantise if self.choice.precision == "int8" else self._convert
        return self.place.conversions.get(key, make)

    def _network_key(self) -> dict[str, str]:
        hardware = Hardware.here()
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

    def _quantise(self, folder: Path) -> None:
        from batchcls.models.engines.openvino_quantise import quantise  # noqa: PLC0415 - nncf takes seconds

        if self.place.calibration is None:
            raise InputError(
                "--precision int8: there are no images to choose its scales by; name a manifest, or use "
                "--precision bf16"
            )
        plain = Converter(self.core, self.bundle, EngineChoice("openvino", "fp32"), self.place, self.backbone)
        network = self.core.read_model(plain._network() / _NETWORK)
        model = quantise(network, self.place.calibration(), self.bundle.config.preprocessing)
        openvino.save_model(model, folder / _NETWORK, compress_to_fp16=False)


def _with_normalisation(model: openvino.Model, bundle: Bundle, pixels: PixelType) -> openvino.Model:
    """N,3,H,W normalised in front of N,H,W,3 pixels; what is normalised already is only turned."""
    steps = PrePostProcessor(model)
    images = steps.input(0)
    images.tensor().set_element_type(_ELEMENTS[pixels]).set_layout(openvino.Layout("NHWC"))
    images.model().set_layout(openvino.Layout("NCHW"))
    if pixels == "uint8":
        preprocessing = bundle.config.preprocessing
        normalise = images.preprocess().convert_element_type(openvino.Type.f32)
        normalise.mean([255 * value for value in preprocessing.mean])
        normalise.scale([255 * value for value in preprocessing.std])
    return steps.build()


def _nncf_version() -> str:
    try:
        return version("nncf")
    except PackageNotFoundError:
        raise InputError(
            "--precision int8: the package nncf is missing; pip install 'batchcls[openvino]'"
        ) from None
