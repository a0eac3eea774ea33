"""Heads: dropout in front of a classifier's last layer, and a new classifier on a trained body."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import nn

from batchcls.errors import InputError
from batchcls.models.libraries.library import Library
from batchcls.models.model_spec import ModelSpec
from batchcls.models.weights import load_strictly


class DroppedLinear(nn.Linear):
    """A linear layer with dropout on its input; its parameters are called as without.

    Attributes:
        p: share of the inputs that is dropped in training.
    """

    p: float = 0.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Float ...,F -> ...,K."""
        return super().forward(nn.functional.dropout(input, self.p, self.training))


def check_dropout(dropout: float) -> float:
    """The share itself. Raises InputError if it is not in 0..1."""
    if not 0 <= dropout <= 1:
        raise InputError(f"--dropout {dropout}: a share from 0 to 1 of the classifier's inputs, as in 0.2")
    return dropout


def set_dropout(model: nn.Module, classifiers: tuple[str, ...], dropout: float) -> None:
    """Put dropout directly in front of each classifier; one that stands there already is set.

    Args:
        model: changed in place; the names and values of its state stay.
        classifiers: paths of the layers that turn features into logits.
        dropout: share (0..1) that is dropped in training.

    Raises:
        InputError: dropout is no share, or a classifier is no linear layer.
    """
    check_dropout(dropout)
    for path in classifiers:
        layer = model.get_submodule(path)
        before = _module_before(model, path)
        if isinstance(before, nn.Dropout):
            before.p = dropout
        elif isinstance(layer, nn.Linear):
            model.set_submodule(path, _dropped(layer, dropout))
        else:
            raise InputError(
                f"--dropout: the classifier {path} of {type(model).__name__} is a {type(layer).__name__}, and "
                "no linear layer; leave dropout out"
            )


def with_new_head(
    library: Library,
    spec: ModelSpec,
    state: Mapping[str, torch.Tensor],
    classes: int,
    dropout: float | None = None,
) -> nn.Module:
    """A trained body under a new classifier, which is initialized as the library does, repeatably.

    Args:
        library: the library of the architecture.
        spec: the architecture.
        state: weights for any number of classes; those of the classifier are not looked at.
        classes: outputs of the new classifier.
        dropout: share (0..1) of the classifier's inputs that is dropped in training; None: what
            the architecture has by itself.

    Raises:
        InputError: the state is not, but for the classifier, exactly that of the architecture.
    """
    model = library.build(spec, classes, dropout)
    heads = tuple(f"{path}." for path in library.classifiers(model))
    fresh = {key: value for key, value in model.state_dict().items() if key.startswith(heads)}
    load_strictly(model, {**library.adapt(spec, dict(state)), **fresh}, f"the pretrained state of {spec}")
    return model


def _module_before(model: nn.Module, path: str) -> nn.Module | None:
    """The module that the classifier's parent was given just before the classifier."""
    parent, _, name = path.rpartition(".")
    children = model.get_submodule(parent).named_children()
    return next((first for (_, first), (second, _) in pairwise(children) if second == name), None)


def _dropped(layer: nn.Linear, dropout: float) -> DroppedLinear:
    with torch.device("meta"):
        dropped = DroppedLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    dropped.weight, dropped.bias, dropped.p = layer.weight, layer.bias, dropout
    return dropped


EVERYTHING = ("*",)
_SUGGESTIONS = 3


@dataclass(frozen=True, slots=True)
class Trainable:
    """What may change in training.

    Attributes:
        names: of the parameters that may, in the network's order.
        parameters: numbers in them.
        total: numbers in all parameters of the network.
    """

    names: tuple[str, ...]
    parameters: int
    total: int


def mark_trainable(model: nn.Module, patterns: Iterable[str] = EVERYTHING) -> Trainable:
    """Let gradients reach the parameters that a pattern matches, and no others.

    Args:
        model: a network that is not cut yet; `requires_grad` of all its parameters is set.
        patterns: globs over names of parameters, as `fc.*` or `layer4.*`; letters count as written.

    Raises:
        InputError: there is no pattern, or one matches nothing; the message has close names. The
            network is then as it was.
    """
    patterns = tuple(patterns)
    parameters = dict(model.named_parameters())
    if not patterns:
        raise InputError("--trainable: name at least one pattern; '*' is everything")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise InputError(_matches_nothing(model, pattern, list(parameters)))
    names = tuple(name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    counts = {name: parameter.numel() for name, parameter in parameters.items()}
    return Trainable(names, sum(counts[name] for name in names), sum(counts.values()))


def _matches_nothing(model: nn.Module, pattern: str, names: list[str]) -> str:
    """The message for a pattern without a match: globs of modules near it, else of the topmost."""
    modules = [
        name for name, part in model.named_modules() if name and next(part.parameters(), None) is not None
    ]
    close = difflib.get_close_matches(pattern.rstrip(".*"), [*modules, *names], n=_SUGGESTIONS)
    if close:
        return f"--trainable {pattern}: no parameter is called so; did you mean {_globs(close, names)}?"
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return f"--trainable {pattern}: no parameter is called so; there are {_globs(tops, names)}"


def _globs(found: list[str], names: list[str]) -> str:
    return ", ".join(name if name in names else f"{name}.*" for name in found)
