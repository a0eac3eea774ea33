"""Dropout in front of a classifier, new classifiers on a pretrained network, and trainable parameters."""

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


class DropoutLinear(nn.Linear):
    """A linear layer with dropout on its input. Its state has the same names as that of `nn.Linear`.

    Attributes:
        p: dropout probability.
    """

    p: float = 0.0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Apply the layer: float ...,F -> ...,K."""
        return super().forward(nn.functional.dropout(input, self.p, self.training))


def check_dropout(dropout: float) -> float:
    """Return the dropout probability. Raises InputError if it is not in 0..1."""
    if not 0 <= dropout <= 1:
        raise InputError(f"--dropout {dropout}: must be a probability from 0 to 1, for example 0.2")
    return dropout


def set_dropout(model: nn.Module, classifiers: tuple[str, ...], dropout: float) -> None:
    """Insert dropout directly in front of each classifier; the probability of existing dropout is changed.

    Args:
        model: modified in place; names and values of its state do not change.
        classifiers: paths of the layers that map features to logits.
        dropout: dropout probability in 0..1.

    Raises:
        InputError: the probability is out of range, or a classifier is not a linear layer.
    """
    check_dropout(dropout)
    for path in classifiers:
        layer = model.get_submodule(path)
        previous = _previous_module(model, path)
        if isinstance(previous, nn.Dropout):
            previous.p = dropout
        elif isinstance(layer, nn.Linear):
            model.set_submodule(path, _with_dropout(layer, dropout))
        else:
            raise InputError(
                f"--dropout: the classifier {path} of {type(model).__name__} is a {type(layer).__name__}, not "
                "a linear layer; omit --dropout"
            )


def with_new_head(
    library: Library,
    spec: ModelSpec,
    state: Mapping[str, torch.Tensor],
    classes: int,
    dropout: float | None = None,
) -> nn.Module:
    """Build a pretrained network with a new classifier, which the library initializes deterministically.

    Args:
        library: the library of the architecture.
        spec: the architecture.
        state: weights for any number of classes; those of the classifier are ignored.
        classes: number of outputs of the new classifier.
        dropout: dropout probability (0..1) in front of the classifier. None: the default of the architecture.

    Raises:
        InputError: apart from the classifier, the state does not match the architecture exactly.
    """
    model = library.build(spec, classes, dropout)
    heads = tuple(f"{path}." for path in library.classifiers(model))
    new = {key: value for key, value in model.state_dict().items() if key.startswith(heads)}
    load_strictly(model, {**library.adapt(spec, dict(state)), **new}, f"the pretrained state of {spec}")
    return model


def _previous_module(model: nn.Module, path: str) -> nn.Module | None:
    """Return the sibling that is registered directly before a module."""
    parent, _, name = path.rpartition(".")
    children = model.get_submodule(parent).named_children()
    return next((first for (_, first), (second, _) in pairwise(children) if second == name), None)


def _with_dropout(layer: nn.Linear, dropout: float) -> DropoutLinear:
    with torch.device("meta"):
        replacement = DropoutLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    replacement.weight, replacement.bias, replacement.p = layer.weight, layer.bias, dropout
    return replacement


EVERYTHING = ("*",)
_SUGGESTIONS = 3


@dataclass(frozen=True, slots=True)
class Trainable:
    """The trainable parameters of a network.

    Attributes:
        names: names of the trainable parameters, in the network's order.
        parameters: number of trainable values.
        total: number of values in all parameters.
    """

    names: tuple[str, ...]
    parameters: int
    total: int


def mark_trainable(model: nn.Module, patterns: Iterable[str] = EVERYTHING) -> Trainable:
    """Make the parameters that match a pattern trainable, and freeze all others.

    Args:
        model: a network that is not split yet; `requires_grad` of all its parameters is set.
        patterns: case-sensitive globs over parameter names, such as `fc.*` or `layer4.*`.

    Raises:
        InputError: there is no pattern, or one matches nothing; the message suggests similar names. The network is
            then unchanged.
    """
    patterns = tuple(patterns)
    parameters = dict(model.named_parameters())
    if not patterns:
        raise InputError("--trainable: name at least one pattern; '*' matches everything")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise InputError(_no_match_message(model, pattern, list(parameters)))
    names = tuple(name for name in parameters if any(fnmatchcase(name, pattern) for pattern in patterns))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    counts = {name: parameter.numel() for name, parameter in parameters.items()}
    return Trainable(names, sum(counts[name] for name in names), sum(counts.values()))


def _no_match_message(model: nn.Module, pattern: str, names: list[str]) -> str:
    """Return the message for a pattern without a match, with globs of similar or of top-level modules."""
    modules = [
        name for name, part in model.named_modules() if name and next(part.parameters(), None) is not None
    ]
    close = difflib.get_close_matches(pattern.rstrip(".*"), [*modules, *names], n=_SUGGESTIONS)
    if close:
        return f"--trainable {pattern}: no parameter matches; did you mean {_globs(close, names)}?"
    top_level = list(dict.fromkeys(name.partition(".")[0] for name in names))
    return f"--trainable {pattern}: no parameter matches; choose from {_globs(top_level, names)}"


def _globs(modules: list[str], names: list[str]) -> str:
    return ", ".join(name if name in names else f"{name}.*" for name in modules)
