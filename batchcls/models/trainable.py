"""Which parameters of a network training changes, as glob patterns over their names."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from batchcls.errors import InputError

EVERYTHING = ("*",)
_SUGGESTIONS = 3


@dataclass(frozen=True, slots=True)
class Trainable:
    """What may change in training.

    Attributes:
        names: of the parameters that may, in the network's order.
        parameters: numbers in them.
        of: numbers in all parameters of the network.
    """

    names: tuple[str, ...]
    parameters: int
    of: int


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
