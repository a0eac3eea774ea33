"""Converts a PyTorch backbone to a network of OpenVINO."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import openvino
import torch
from openvino._offline_transformations import apply_moc_transformations
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

from batchcls.errors import InputError
from batchcls.models.backbone import Backbone
from batchcls.preprocessing import Preprocessing

_LARGEST_BATCH = 4096


def trace(backbone: Backbone, preprocessing: Preprocessing) -> openvino.Model:
    """Convert a backbone to float32: N,3,H,W normalized images -> `logits` N,K and `embedding` N,D.

    The front end is called directly. OpenVINO's `convert_model` does the same, but sends a usage report for each call.

    Raises:
        InputError: the network has a part that PyTorch cannot export or OpenVINO does not support.
    """
    height, width, channels = preprocessing.shape
    # Two images, because torch.export would specialize on a batch of one.
    example = torch.zeros(2, channels, height, width)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    frontend = FrontEndManager().load_by_framework("pytorch")
    try:
        with _logging_suppressed(), torch.no_grad():
            program = torch.export.export(backbone, (example,), dynamic_shapes={"images": {0: batch}})
            # The variable keeps the decoder alive: the front end calls it but does not hold a reference.
            decoder = TorchFXPythonDecoder.from_exported_program(program)
            model = frontend.convert(frontend.load(decoder))
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"this network cannot be converted for OpenVINO ({_short_reason(error)}); use --engine torch"
        ) from error
    for port, name in zip(model.outputs, ("logits", "embedding"), strict=True):
        port.get_tensor().set_names({name})
    model.reshape([-1, channels, height, width])
    # Folds batch normalization into convolutions, as `convert_model` does. Compilation would also do it, but
    # quantization comes first, and without the folding mobilenetv2_100 lost 5 pp of accuracy in int8
    # (docs/measurements).
    apply_moc_transformations(model, cf=False, smart_reshape=False)
    return model


def _short_reason(error: Exception) -> str:
    """Return one line, without the location in OpenVINO's own source with which its messages start."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    informative = [line for line in lines if not line.startswith("Check '")]
    return " ".join((informative or lines or [type(error).__name__])[:2])


@contextmanager
def _logging_suppressed() -> Iterator[None]:
    """Suppress warnings, and the decoder's messages about operations that this network does not have.

    The decoder logs through the root logger, which would install a handler for the process if it had none.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addFilter(_drop_record)
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(_drop_record)


def _drop_record(_: logging.LogRecord) -> bool:
    return False
