"""Exports a bundle's network as a program for other runtimes: uint8 pixels -> logits and embedding.

The normalization is part of the program, so that a caller cannot apply another mean. The caller resizes and crops, as
`model.json` next to the program describes.
"""

import io
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.models.engines.engine import EngineOutput
from batchcls.models.model_bundle import Bundle
from batchcls.preprocessing import Preprocessing

ExportFormat = Literal["onnx", "torch-export"]
Program = Callable[[npt.NDArray[np.uint8]], EngineOutput]

FILE_NAMES: Mapping[ExportFormat, str] = {"onnx": "model.onnx", "torch-export": "model.pt2"}
INPUT_NAME = "images"
OUTPUT_NAMES = ("logits", "embedding")

_LARGEST_BATCH = 4096


class _NormalizedModel(nn.Module):
    """uint8 N,H,W,3 -> logits N,K and embedding N,D, both float32."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.backbone = backbone
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normalized = images.permute(0, 3, 1, 2).float() * self.scale + self.shift
        outputs: tuple[torch.Tensor, torch.Tensor] = self.backbone(normalized)
        return outputs


def export_program(backbone: Backbone, preprocessing: Preprocessing, kind: ExportFormat) -> bytes:
    """Export the program as the bytes of one file; it accepts batches of 1 to 4096 images.

    Raises:
        InputError: the packages of the format are not installed, or the network cannot be exported.
    """
    if kind == "onnx":
        _check_onnx_packages()
    # Two images, because torch.export would specialize on a batch of one.
    example = torch.zeros(2, *preprocessing.shape, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    module = _NormalizedModel(backbone, preprocessing).eval()
    try:
        with torch.no_grad():
            program = torch.export.export(module, (example,), dynamic_shapes={INPUT_NAME: {0: batch}})
        return _onnx_bytes(program) if kind == "onnx" else _torch_export_bytes(program)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"this network cannot be exported as {kind} ({reason}); try another --format or architecture"
        ) from error


def describe_program(bundle: Bundle, kind: ExportFormat) -> dict[str, Any]:
    """Describe a program for its callers as JSON values: input, outputs, resize, crop and provenance."""
    config = bundle.config
    height, width, channels = config.preprocessing.shape
    return {
        "file": FILE_NAMES[kind],
        "input": {
            "name": INPUT_NAME,
            "dtype": "uint8",
            "shape": ["batch", height, width, channels],
            "order": "RGB",
        },
        "outputs": {
            OUTPUT_NAMES[0]: {"dtype": "float32", "shape": ["batch", len(config.labels)]},
            OUTPUT_NAMES[1]: {"dtype": "float32", "shape": ["batch", config.embedding_dimension]},
        },
        "resize_and_crop": config.preprocessing.model_dump(mode="json", exclude={"mean", "std"}),
        "normalization": "part of the program; pass pixels of 0 to 255",
        "labels": "labels.txt, one per line, in the order of the logits",
        "architecture": str(config.spec),
        "bundle_fingerprint": bundle.fingerprint,
    }


def load_program(data: bytes, kind: ExportFormat) -> Program:
    """Load an exported program on the CPU, as a function from N,H,W,3 uint8 pixels to its outputs."""
    return _load_onnx(data) if kind == "onnx" else _load_torch_export(data)


def _torch_export_bytes(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _onnx_bytes(program: torch.export.ExportedProgram) -> bytes:
    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[INPUT_NAME],
        output_names=list(OUTPUT_NAMES),
    )
    if converted is None:
        raise RuntimeError("the exporter returned no program")
    data: bytes = converted.model_proto.SerializeToString()
    return data


def _load_onnx(data: bytes) -> Program:
    import onnxruntime  # noqa: PLC0415 - an optional dependency

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda pixels: EngineOutput(*session.run(list(OUTPUT_NAMES), {INPUT_NAME: pixels}))


def _load_torch_export(data: bytes) -> Program:
    module = torch.export.load(io.BytesIO(data)).module()

    def predict(pixels: npt.NDArray[np.uint8]) -> EngineOutput:
        with torch.inference_mode():
            logits, embedding = module(torch.from_numpy(pixels))
        return EngineOutput(logits.numpy(), embedding.numpy())

    return predict


def _check_onnx_packages() -> None:
    """Raise InputError if an optional package is missing, before an export that may take minutes."""
    try:
        import onnxruntime  # noqa: F401, PLC0415 - an optional dependency
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise InputError(
            f"--format onnx requires a package that is not installed ({error.name}): pip install 'batchcls[export]', "
            "or use --format torch-export"
        ) from error
