"""A backbone in PyTorch becomes a network of OpenVINO."""

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
    """The network in float32: N,3,H,W normalized images -> `logits` N,K and `embedding` N,D.

    The front end is called as it is: OpenVINO's `convert_model` does the same, and reports each call
    to its maker over the network.

    Raises:
        InputError: the network has a part that PyTorch cannot export or OpenVINO does not know.
    """
    height, width, channels = preprocessing.shape
    # Two images: a batch of one would be taken for a constant.
    example = torch.zeros(2, channels, height, width)
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    frontend = FrontEndManager().load_by_framework("pytorch")
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(backbone, (example,), dynamic_shapes={"images": {0: batch}})
            # The name keeps it alive: the front end calls it and does not hold it.
            decoder = TorchFXPythonDecoder.from_exported_program(program)
            model = frontend.convert(frontend.load(decoder))
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"this network cannot be converted for OpenVINO ({_reason(error)}); use --engine torch"
        ) from error
    for port, name in zip(model.outputs, ("logits", "embedding"), strict=True):
        port.get_tensor().set_names({name})
    model.reshape([-1, channels, height, width])
    # As `convert_model` does: folds batch normalization into convolutions. Compiling would do it, too, but
    # quantizing comes before, and without it mobilenetv2_100 in int8 lost 5 points (docs/measurements).
    apply_moc_transformations(model, cf=False, smart_reshape=False)
    return model


def _reason(error: Exception) -> str:
    """One line. OpenVINO begins with the place in its own source, which tells a user nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith("Check '")]
    return " ".join((telling or lines or [type(error).__name__])[:2])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the decoder says of operations that this network does not have.

    It speaks through the root logger, which would set up a handler for everybody if it had none.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addFilter(_refuse)
    root.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(handler)
        root.removeFilter(_refuse)


def _refuse(_: logging.LogRecord) -> bool:
    return False
