"""The two libraries of architectures, and the lookup of models by name."""

from collections.abc import Mapping
from typing import cast

from batchcls.errors import InputError
from batchcls.models.libraries.library import Library
from batchcls.models.libraries.timm_library import TimmLibrary
from batchcls.models.libraries.torchvision_library import TorchvisionLibrary
from batchcls.models.model_names import qualified_name, suggest_names
from batchcls.models.model_spec import Arguments, ModelSpec, SourceName

LIBRARIES: Mapping[SourceName, Library] = {"torchvision": TorchvisionLibrary(), "timm": TimmLibrary()}


def get_library(spec: ModelSpec) -> Library:
    """Return the library of an architecture."""
    return LIBRARIES[spec.source]


def find_model(text: str, arguments: Arguments) -> ModelSpec:
    """Return the spec of a name, with the arguments that its pretrained weights require.

    Raises:
        InputError: there is no such architecture or tag; the message suggests similar names.
    """
    source, _, architecture = (qualified_name(text) or text).partition(":")
    spec = ModelSpec(cast("SourceName", source), architecture, dict(arguments))
    library = get_library(spec)
    if not library.check(architecture):
        raise InputError(f"there is no model {text}{suggest_names(architecture)}")
    return library.complete(spec)
