"""Counts the parameters and the multiply-adds per image of a network."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Size and compute of a network.

    Attributes:
        parameters: number of trainable values, without buffers such as the running means of BatchNorm.
        multiply_adds: MACs of convolutions and matrix products for one image. One multiply-add is two floating-point
            operations.
    """

    parameters: int
    multiply_adds: int


def count_cost(module: nn.Module, input_size: tuple[int, int]) -> ModelCost:
    """Count with a forward pass on one image of zeros, on the device of the parameters.

    On the meta device the pass costs neither compute nor memory. On other devices it is a real forward pass.

    Args:
        module: a network on images, float N,3,H,W, with any outputs.
        input_size: H, W in pixels.

    Raises:
        ValueError: the network is in training mode, in which a pass changes the statistics of BatchNorm.
    """
    if module.training:
        raise ValueError("the network is in training mode; call eval() first")
    first = next(module.parameters())
    image = torch.zeros(1, 3, *input_size, device=first.device, dtype=first.dtype)
    with _unfused_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return ModelCost(parameters, counter.get_total_flops() // 2)


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Compute attention as separate matrix products.

    PyTorch's fused attention kernels are single operations, and the counter does not support all of them: it counts
    11 of the 18 billion multiply-adds of a ViT-B/16 in evaluation mode on a CPU.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
