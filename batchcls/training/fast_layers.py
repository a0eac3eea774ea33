"""Faster computation of the same layers during training; names and values of the state do not change.

Symbols: O output channels of a convolution, I input channels, k kernel size.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from batchcls.models.feature_taps import eval_mode, forward_full, random_image

_NORMS = (nn.BatchNorm2d, BatchNormAct2d)
_TOLERANCE = 1e-3  # of the largest output; rounding in float32 is below 1e-5

_logger = logging.getLogger(__name__)

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


def fuse_frozen_norms(model: nn.Module, input_size: tuple[int, int]) -> int:
    """Compute each convolution and the BatchNorm directly after it as one convolution.

    With frozen statistics, BatchNorm multiplies each channel by a factor and adds an offset. Both are applied to the
    weights of the convolution, which are smaller than its output. Both layers keep their parameters, and gradients
    are the same except for rounding.

    The pairs are found in a forward pass. If the output then differs by more than rounding, for example because the
    output of a convolution is used twice, no pair is fused.

    Args:
        model: network on any device, modified in place. The statistics of its BatchNorm layers must remain frozen.
        input_size: height and width of an image that the network accepts.

    Returns:
        The number of fused pairs.
    """
    image = random_image(input_size).to(next(model.parameters()).device)
    with eval_mode(model):
        pairs: list[Pair] = []
        with _recording(model, pairs):
            expected: Tensor = forward_full(model, image)
        for convolution, norm in pairs:
            # Instance attributes, because a submodule or parametrization would change the names of the state.
            vars(convolution)["forward"] = partial(_fused, convolution, norm)
            vars(norm)["forward"] = partial(_activation, norm)
        output: Tensor = forward_full(model, image)
        if not (output - expected).abs().max() <= _TOLERANCE * expected.abs().max().clamp(min=1):
            _logger.debug("%s: convolutions are not fused with BatchNorm", type(model).__name__)
            for module in (module for pair in pairs for module in pair):
                del vars(module)["forward"]
            return 0
    return len(pairs)


def use_out_of_place_activations(model: nn.Module) -> None:
    """Let activations return new arrays, which is faster on CPUs except for ReLU, and needs more memory.

    PyTorch computes the others (ReLU6, SiLU, Hardswish) out of place in any case, and copies the result or, for the
    backward pass, the input.
    """
    for module in model.modules():
        if getattr(module, "inplace", False) and type(module) is not nn.ReLU:
            vars(module)["inplace"] = False


@contextmanager
def _recording(model: nn.Module, pairs: list[Pair]) -> Iterator[None]:
    """Add the pairs of a forward pass: the input of the norm is the output of the convolution. Both run once."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    calls: dict[nn.Module, int] = {}

    def after_convolution(module: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        calls[module] = calls.get(module, 0) + 1
        outputs[id(output)] = module, output  # the reference keeps the id unique

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        calls[module] = calls.get(module, 0) + 1
        if id(inputs[0]) in outputs and module.running_mean is not None:
            pairs.append((outputs[id(inputs[0])][0], module))

    handles = [
        module.register_forward_hook(after_convolution)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ] + [
        module.register_forward_pre_hook(before_norm)
        for module in model.modules()
        if type(module) in _NORMS  # a subclass may compute something else
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        pairs[:] = [pair for pair in pairs if all(calls[module] == 1 for module in pair)]


def _fused(convolution: nn.Conv2d, norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """Run the convolution's own forward method with the weights (O, I, k, k) and the bias (O) of the pair."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = convolution.weight, convolution.bias
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight
    offset = -norm.running_mean if bias is None else bias - norm.running_mean
    offset = offset * factor if norm.bias is None else offset * factor + norm.bias
    parameters = vars(convolution)["_parameters"]
    parameters.update(weight=weight * factor.reshape(-1, 1, 1, 1), bias=offset)
    try:
        output: Tensor = type(convolution).forward(convolution, images)
    finally:
        parameters.update(weight=weight, bias=bias)
    return output


def _activation(norm: nn.BatchNorm2d, features: Tensor) -> Tensor:
    """Do what remains of the norm: nothing in PyTorch; dropout and the activation in timm's combined layer."""
    if not isinstance(norm, BatchNormAct2d):
        return features
    output: Tensor = norm.act(norm.drop(features))
    return output
