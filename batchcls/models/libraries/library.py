"""The interface of a library of architectures, and the functions that both libraries share."""

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
    """Downloaded weights: the architecture with its full tag, and the state."""

    architecture: str
    state: State


class Library(Protocol):
    """A source of architectures. `check` is called with an architecture before any other method."""

    def check(self, architecture: str) -> bool:
        """Return whether the architecture exists. Raises InputError for an unknown tag of a known architecture."""

    def complete(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec with the arguments that the pretrained weights require."""

    def build(self, spec: ModelSpec, classes: int | None, dropout: float | None = None) -> nn.Module:
        """Build the architecture with random weights.

        Args:
            spec: the architecture.
            classes: number of outputs of the classifier. None: that of the pretrained weights.
            dropout: dropout probability (0..1) in front of the classifier. None: the default of the architecture.
                Names and values of the state do not depend on it.

        Raises:
            InputError: the arguments do not fit the architecture, or the dropout probability is out of range.
        """

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """Return the paths of the modules, almost always one, that map features to logits."""

    def stages(self, model: nn.Module, input_size: tuple[int, int]) -> tuple[FeatureStage, ...]:
        """Return the stages of an unmodified network for images of H, W, from the input to the output.

        The network's training mode and statistics are not changed. Empty if the network has no feature maps.

        Raises:
            InputError: the network does not accept this size.
        """

    def preprocessing(self, spec: ModelSpec, overrides: PreprocessingOverrides) -> Preprocessing:
        """Return the preprocessing of the pretrained weights, with overrides applied."""

    def adapt(self, spec: ModelSpec, state: State) -> State:
        """Return a published state with the names that `build` uses, without auxiliary training heads."""

    def pretrained(self, spec: ModelSpec) -> Pretrained:
        """Download the pretrained weights. Raises InputError if that is not possible."""


def make_preprocessing(
    name: str, values: Mapping[str, object], overrides: PreprocessingOverrides
) -> Preprocessing:
    """Create preprocessing from values of a library, and override its mean, std, interpolation and crop mode.

    The caller has applied the overrides of the sizes to `values`.

    Args:
        name: name of the model in error messages.
        values: fields of `Preprocessing`.
        overrides: settings of the user.

    Raises:
        InputError: the values are inconsistent or not supported.
    """
    overridden = overrides.model_dump(
        include={"mean", "std", "interpolation", "crop_mode"}, exclude_none=True
    )
    try:
        return Preprocessing.model_validate({**values, **overridden})
    except ValidationError as error:
        problem = "; ".join(": ".join((*map(str, item["loc"][:1]), item["msg"])) for item in error.errors())
        raise InputError(
            f"preprocessing of {name}: {problem}; change it with --input-size, --crop-pct, --crop-mode, --mean, "
            "--std or --interpolation"
        ) from error


def refuse_reserved(spec: ModelSpec, reserved: Mapping[str, str]) -> None:
    """Raise InputError for arguments that cannot be set with --model-args. `reserved`: name -> remedy."""
    for name in spec.arguments:
        if name in reserved:
            raise InputError(f"--model-args {name} of {spec}: {reserved[name]}")


def bad_arguments(spec: ModelSpec, error: Exception) -> InputError:
    """Return the error for an architecture that could not be built."""
    arguments = ", ".join(f"{k}={v}" for k, v in spec.arguments.items()) or "none"
    return InputError(f"{spec} cannot be built ({error}); check --model-args (given: {arguments})")


def download_error(spec: ModelSpec, error: Exception) -> InputError:
    """Return the error for weights that cannot be downloaded."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(
        f"the pretrained weights of {spec} cannot be downloaded ({reason}); pass --weights FILE.safetensors, or as "
        "--model a bundle that was created on a machine with network access"
    )


def require_reachable(url: str) -> None:
    """Raise OSError if there is no response from `url` within ten seconds.

    The downloads of the libraries retry for most of a minute before they fail. Any HTTP status counts as a response;
    the download handles it.
    """
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return


@contextmanager
def repeatable_initialization() -> Iterator[None]:
    """Initialize weights deterministically inside the context, without changing the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_INITIALIZATION_SEED)
        yield
