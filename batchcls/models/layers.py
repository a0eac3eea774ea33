"""The depth of each layer of a network, and the parameters that are exempt from weight decay.

Layer-wise learning rate decay needs the former. Networks of timm provide both; for networks of torchvision they are
derived here.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from timm.models import group_parameters
from timm.optim import _param_groups
from torch import nn
from torchvision.models.maxvit import MaxVitBlock
from torchvision.models.vision_transformer import Encoder

from batchcls.errors import InputError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_STAGES = (Encoder, MaxVitBlock)

# Parameters that are exempt in addition to biases and norms: those of torchvision's training scripts
# (`--transformer-embedding-decay 0`), and the scales of ConvNeXt and Swin, which timm exempts.
_TORCHVISION_EXEMPT = (
    "class_token",
    "pos_embedding",
    "relative_position_bias_table",
    "layer_scale",
    "logit_scale",
)


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return the layer number of each parameter by name: 0 at the input, the largest number for the classifier.

    Networks of timm are grouped by timm, all others in the order of their modules: each block of a stage is a layer,
    and so is each convolution or linear layer outside of blocks, together with the norms that follow it.

    Args:
        model: a network that is not split.

    Raises:
        InputError: the layers of the network cannot be distinguished.
    """
    untyped: Any = model
    if hasattr(model, "group_matcher"):
        depths: dict[str, int] = group_parameters(model, untyped.group_matcher(coarse=False), reverse=True)
    elif getattr(model, "pretrained_cfg", None):
        auto_group_layers: Any = _param_groups.auto_group_layers
        depths = auto_group_layers(model)
    else:
        depths = _in_module_order(model)
    if max(depths.values(), default=0) == 0:
        raise InputError(
            f"the order of the layers of {type(model).__name__} is not known, so layer-wise learning rate decay is not "
            "possible; use a recipe with layer_decay = 1"
        )
    return depths


def exempt_from_weight_decay(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters without weight decay: biases, norms, and those of the library.

    timm names additional parameters (or globs) in the network's method `no_weight_decay`, torchvision in its training
    scripts.
    """
    parameters = dict(model.named_parameters())
    vectors = {name for name, value in parameters.items() if value.ndim <= 1}
    untyped: Any = model
    if hasattr(model, "no_weight_decay"):
        patterns = tuple(untyped.no_weight_decay())
        matching = {name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns)}
    else:
        matching = {name for name in parameters if name.rpartition(".")[2] in _TORCHVISION_EXEMPT}
    return frozenset(vectors | matching)


def _in_module_order(model: nn.Module) -> dict[str, int]:
    depths: dict[str, int] = {}
    depth = -1
    for names, starts_layer in _parameter_groups("", model):
        depth += starts_layer
        depths |= dict.fromkeys(names, max(depth, 0))
    return depths


def _parameter_groups(prefix: str, stage: nn.Module) -> Iterator[tuple[list[str], bool]]:
    """Yield groups of parameter names, with whether a group starts a new layer or continues the previous one.

    Norms outside of blocks, and a stage's own parameters such as position embeddings, continue the previous layer.
    """
    yield [f"{prefix}{name}" for name, _ in stage.named_parameters(recurse=False)], False
    for name, child in stage.named_children():
        path = f"{prefix}{name}."
        if _is_stage(child):
            yield from _parameter_groups(path, child)
        else:
            parameters = dict(child.named_parameters())
            starts_layer = any(value.ndim > 1 for value in parameters.values())
            yield [f"{path}{part}" for part in parameters], starts_layer


def _is_stage(module: nn.Module) -> bool:
    """Return whether a module is a sequence of layers: a plain container, or a subclass of one that contains blocks."""
    if type(module) in _CONTAINERS or isinstance(module, _STAGES):
        return True
    parts = [part for part in module.children() if next(part.parameters(), None) is not None]
    return isinstance(module, _CONTAINERS) and any(next(part.children(), None) is not None for part in parts)
