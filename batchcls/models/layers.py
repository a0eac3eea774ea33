"""In which order a network's layers come, from the image upwards, and which parameters keep their length.

Learning rates that fall from layer to layer need the first, weight decay the second. Networks of timm know
both themselves; those of torchvision know neither.
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

# What torchvision's own training leaves out of weight decay beside biases and norms
# (`--transformer-embedding-decay 0`), and the factors of ConvNeXt and Swin, which timm leaves out.
_TORCHVISION_EXEMPT = (
    "class_token",
    "pos_embedding",
    "relative_position_bias_table",
    "layer_scale",
    "logit_scale",
)


def layer_depths(model: nn.Module) -> dict[str, int]:
    """For each parameter's name the number of its layer: 0 is next to the image, the largest has the classifier.

    Networks of timm are grouped as timm does it, all others in the order of their modules: a block of a stage
    is one layer, and so is a convolution or linear layer outside of blocks, with the norms that follow it.

    Args:
        model: an intact network.

    Raises:
        InputError: the network does not tell its layers apart.
    """
    known: Any = model
    if hasattr(model, "group_matcher"):
        depths: dict[str, int] = group_parameters(model, known.group_matcher(coarse=False), reverse=True)
    elif getattr(model, "pretrained_cfg", None):
        grouping: Any = _param_groups.auto_group_layers
        depths = grouping(model)
    else:
        depths = _in_module_order(model)
    if max(depths.values(), default=0) == 0:
        raise InputError(
            f"the order of the layers of {type(model).__name__} is not known, so their learning rates cannot fall from "
            "one to the next; take a recipe with layer_decay = 1"
        )
    return depths


def exempt_from_weight_decay(model: nn.Module) -> frozenset[str]:
    """Names of the parameters without weight decay: biases, norms, and those that the network names.

    A network of timm says which by its method `no_weight_decay` (names or globs), torchvision in its scripts for
    training.
    """
    named = dict(model.named_parameters())
    small = {name for name, value in named.items() if value.ndim <= 1}
    known: Any = model
    if hasattr(model, "no_weight_decay"):
        patterns = tuple(known.no_weight_decay())
        return frozenset(
            small | {name for name in named if any(fnmatchcase(name, part) for part in patterns)}
        )
    return frozenset(small | {name for name in named if name.rpartition(".")[2] in _TORCHVISION_EXEMPT})


def _in_module_order(model: nn.Module) -> dict[str, int]:
    depths: dict[str, int] = {}
    depth = -1
    for names, opens in _layers("", model):
        depth += opens
        depths |= dict.fromkeys(names, max(depth, 0))
    return depths


def _layers(prefix: str, stage: nn.Module) -> Iterator[tuple[list[str], bool]]:
    """Names of the parameters that belong together, and whether they are another layer or part of the one before.

    Norms alone and a stage's own parameters, as embeddings of places, belong to the layer before them.
    """
    yield [f"{prefix}{name}" for name, _ in stage.named_parameters(recurse=False)], False
    for name, child in stage.named_children():
        path = f"{prefix}{name}."
        if _is_stage(child):
            yield from _layers(path, child)
        else:
            parameters = dict(child.named_parameters())
            opens = any(value.ndim > 1 for value in parameters.values())
            yield [f"{path}{part}" for part in parameters], opens


def _is_stage(module: nn.Module) -> bool:
    """Whether a module is but a row of layers: a plain container, or one of blocks and not of single operations."""
    if type(module) in _CONTAINERS or isinstance(module, _STAGES):
        return True
    parts = [part for part in module.children() if next(part.parameters(), None) is not None]
    return isinstance(module, _CONTAINERS) and any(next(part.children(), None) is not None for part in parts)
