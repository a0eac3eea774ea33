"""A backbone and a precision become a running engine: the one place that knows all engines."""

from batchcls.models.backbone import Backbone
from batchcls.models.engines import Engine
from batchcls.models.engines.torch_eager import TorchEager, choose_device_and_precision
from batchcls.preprocessing import Preprocessing


def start_engine(
    backbone: Backbone, preprocessing: Preprocessing, device: str, precision: str, threads: int
) -> Engine:
    """Put a backbone on the device.

    Args:
        backbone: taken over; its weights move to the device.
        preprocessing: of the backbone's weights.
        device: auto, cpu or cuda.
        precision: auto, fp32, bf16 or fp16.
        threads: CPU threads of this process for one operation, at least 1.

    Raises:
        InputError: the device or the precision is not there.
    """
    device, precision = choose_device_and_precision(device, precision)
    return TorchEager(backbone, preprocessing, device=device, precision=precision, threads=threads)


def describe(engine: Engine) -> str:
    """What an engine is, in a few words, as in `torch bf16 on cpu`."""
    return f"{engine.name} {engine.precision} on {engine.device}"
