"""What a library of architectures must answer, and the words that are shared between libraries."""

import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import ValidationError
from torch import nn

from batchcls.errors import InputError
from batchcls.models.feature_taps import FeatureStage
from batchcls.models.model_spec import ModelSpec, PreprocessingOverrides
from batchcls.models.weights import State
from batchcls.preprocessing import Preprocessing

_PROBE_SECONDS = 10.0
_INITIALIZATION_SEED = 0


@dataclass(frozen=True, slots=True)
class Pretrained:
    """Downloaded weights: the architecture with the full tag they carry, and their state."""

    architecture: str
    state: State


class Library(Protocol):
    """A source of architectures. Architecture names are checked before any other call."""

    def check(self, architecture: str) -> bool:
        """Whether the architecture exists. Raises InputError for an unknown tag of a known one."""

    def complete(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the arguments that the weights' own configuration asks for."""

    def build(self, spec: ModelSpec, classes: int | None, dropout: float | None = None) -> nn.Module:
        """The architecture with random weights.

        Args:
            spec: the architecture.
            classes: outputs of the classifier; None: as many as its published weights have.
            dropout: share (0..1) of the classifier's inputs that is dropped in training; None: what
                the architecture has by itself. Names and values of a state do not depend on it.

        Raises:
            InputError: the arguments do not fit the architecture, or dropout is no share.
        """

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """Paths of the modules, almost always one, that turn features into logits."""

    def stages(self, model: nn.Module, input_size: tuple[int, int]) -> tuple[FeatureStage, ...]:
        """The stages of an intact network for images of H, W, from the image upwards.

        The network's mode and statistics stay as they are. Empty where it has no feature maps.

        Raises:
            InputError: the network does not take this size.
        """

    def preprocessing(self, spec: ModelSpec, overrides: PreprocessingOverrides) -> Preprocessing:
        """The record that belongs to the architecture's published weights, with overrides applied."""

    def adapt(self, spec: ModelSpec, state: State) -> State:
        """A published state under the names that `build` uses, without heads used in training only."""

    def pretrained(self, spec: ModelSpec) -> Pretrained:
        """Download the published weights. Raises InputError where that is not possible."""


def make_preprocessing(
    where: str, values: Mapping[str, object], chosen: PreprocessingOverrides
) -> Preprocessing:
    """A record from a library's values and a user's colors and filter; sizes are settled before.

    Raises:
        InputError: the values do not make sense together, or are of a kind that is not known here.
    """
    overridden = chosen.model_dump(include={"mean", "std", "interpolation"}, exclude_none=True)
    try:
        return Preprocessing.model_validate({**values, **overridden})
    except ValidationError as error:
        problem = "; ".join(": ".join((*map(str, item["loc"][:1]), item["msg"])) for item in error.errors())
        raise InputError(
            f"preprocessing of {where}: {problem}; change it with --input-size, --crop-pct, --mean, --std or "
            "--interpolation"
        ) from error


def refuse_reserved(spec: ModelSpec, reserved: Mapping[str, str]) -> None:
    """Refuse arguments that are settled elsewhere. `reserved`: name -> what to do instead."""
    for name in spec.arguments:
        if name in reserved:
            raise InputError(f"--model-args {name} of {spec}: {reserved[name]}")


def bad_arguments(spec: ModelSpec, error: Exception) -> InputError:
    """The error for an architecture that could not be built."""
    given = ", ".join(f"{k}={v}" for k, v in spec.arguments.items()) or "none"
    return InputError(f"{spec} cannot be built ({error}); check --model-args, given are: {given}")


def no_download(spec: ModelSpec, error: Exception) -> InputError:
    """The error for weights that cannot be downloaded."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"the pretrained weights of {spec} cannot be downloaded ({reason}); "
        "pass --weights FILE.safetensors, or as --model a bundle made where there is a network"
    )


def require_reachable(url: str) -> None:
    """Raise OSError if nobody answers at `url` within seconds.

    The libraries' own downloads retry for most of a minute before they say so. Any HTTP status
    counts as an answer: what the server thinks of the request is the download's business.
    """
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return


@contextmanager
def repeatable_initialization() -> Iterator[None]:
    """The same random weights each time, and the caller's random numbers left as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_INITIALIZATION_SEED)
        yield
