"""A bundle and the name of an engine become a running engine: the one place that knows them all."""

from batchcls.models.bundle import Bundle, build_backbone
from batchcls.models.engines import Engine
from batchcls.models.engines.torch_eager import TorchEager, choose_device_and_precision


def start_engine(bundle: Bundle, device: str, precision: str, threads: int) -> Engine:
    """Build the bundle's network and put it on the device.

    Args:
        bundle: the model.
        device: auto, cpu or cuda.
        precision: auto, fp32, bf16 or fp16.
        threads: CPU threads of this process for one operation, at least 1.

    Raises:
        InputError: the bundle does not hold together, or the device or precision is not there.
    """
    device, precision = choose_device_and_precision(device, precision)
    return TorchEager(
        build_backbone(bundle),
        bundle.config.preprocessing,
        device=device,
        precision=precision,
        threads=threads,
    )


def describe(engine: Engine) -> str:
    """What an engine is, in a few words, as in `torch bf16 on cpu`."""
    return f"{engine.name} {engine.precision} on {engine.device}"
