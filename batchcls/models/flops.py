"""What one image costs a network: its parameters and its multiply-adds, counted and not looked up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Size and work of a network.

    Attributes:
        parameters: values that training could change; no buffers, such as the means of BatchNorm.
        multiply_adds: of convolutions and matrix products, for one image. One multiply-add is two
            floating point operations.
    """

    parameters: int
    multiply_adds: int


def count_cost(module: nn.Module, input_size: tuple[int, int]) -> ModelCost:
    """Count by a forward pass on one image of zeros, on the device that the parameters are on.

    On the meta device that takes no arithmetic and no memory. Elsewhere it is a real pass.

    Args:
        module: a network on images, float N,3,H,W; what it answers with does not matter.
        input_size: H, W in pixels.

    Raises:
        ValueError: the network is in training mode, where a pass changes the statistics of BatchNorm.
    """
    if module.training:
        raise ValueError("the cost is counted in evaluation mode; call eval() first")
    first = next(module.parameters())
    image = torch.zeros(1, 3, *input_size, device=first.device, dtype=first.dtype)
    with _visible_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return ModelCost(parameters, counter.get_total_flops() // 2)


@contextmanager
def _visible_attention() -> Iterator[None]:
    """Attention as matrix products.

    PyTorch's fused kernels are one operation each, of which the counter does not know them all: it
    sees 11 of the 18 thousand million multiply-adds of a ViT-B/16 in evaluation mode on a CPU.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
